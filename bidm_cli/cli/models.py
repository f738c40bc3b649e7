"""Opening of a command's MODEL: a packed file, an original checkpoint or a bare configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bidm_cli.checkpoints.families.diffusers.files import is_part
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.config import CONFIG_SUFFIXES
from bidm_cli.checkpoints.reading.hub import is_hub_id
from bidm_cli.checkpoints.reading.unpickle import existing_file, safetensors_metadata
from bidm_cli.cli.warm_up import compiling
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError


def open_model(
    path: str | Path,
    config: str | Path | None = None,
    ema: bool = True,
    device: str = "cpu",
    backend: str = "auto",
    **given: Any,
) -> DiffusionModel:
    """Open a packed file (:class:`PackedModel`), a checkpoint or a bare configuration (:class:`Checkpoint`).

    A checkpoint is a file, or a diffusers folder.

    A bare configuration's networks stay on the meta device.

    Args:
        config, ema: for checkpoints (see :func:`bidm_cli.checkpoints.open.load_checkpoint`).
        backend: for packed files; its kernels are compiled here if they are not yet.
        given: for checkpoints, family, settings and first_stage as ``load_checkpoint`` takes them.

    Raises:
        BidmError: no such file, or it cannot be opened.
    """
    if is_hub_id(path) or Path(path).is_dir():
        return load_checkpoint(path, config=config, ema=ema, **given).to(device)
    path = existing_file(path)
    if path.suffix == ".bidm" or "bidm" in (safetensors_metadata(path) or {}):
        if given:
            raise BidmError(
                f"{path} is a packed file, which says everything itself; leave out {_options(given)}"
            )
        from bidm_cli.packed.format.read import load_packed

        packed = load_packed(path, device=device, backend=backend)
        packed.warm_up(compiling)
        return packed
    if path.suffix.lower() in CONFIG_SUFFIXES and not is_part(path):
        if config is not None:
            raise BidmError(f"{path} is a configuration itself; leave out --config")
        if given.keys() - {"settings"}:
            raise BidmError(f"{path} is a configuration without weights; leave out {_options(given)}")
        return load_architecture(path, **given)
    return load_checkpoint(path, config=config, ema=ema, **given).to(device)


def _options(given: dict[str, Any]) -> str:
    return ", ".join({"settings": "--set"}.get(name, f"--{name.replace('_', '-')}") for name in given)
