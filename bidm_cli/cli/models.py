"""The MODEL argument of a command, opened as the command line says."""

from __future__ import annotations

from pathlib import Path

from bidm_cli.checkpoints import open as opening
from bidm_cli.checkpoints.first_stages.file import StageFile
from bidm_cli.cli.checkpoint_options import Reading
from bidm_cli.cli.warm_up import compiling
from bidm_cli.diffusion.model import DiffusionModel


def open_model(
    path: str | Path,
    config: str | Path | None = None,
    ema: bool = True,
    device: str = "cpu",
    backend: str = "auto",
    reading: Reading | None = None,
) -> DiffusionModel:
    """See :func:`bidm_cli.checkpoints.open.open_model`."""
    more = {} if reading is None else reading.given()
    return opening.open_model(path, config, ema, device, backend, compiling, **more)


def open_any(
    path: str | Path, config: str | Path | None, backend: str, reading: Reading
) -> DiffusionModel | StageFile:
    """See :func:`bidm_cli.checkpoints.open.open_any`."""
    return opening.open_any(path, config, backend=backend, say=compiling, **reading.given())
