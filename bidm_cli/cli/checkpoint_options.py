"""Options on reading an original checkpoint, for every command that opens one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from bidm_cli.cli.options import grouped, path_option


@dataclass(frozen=True)
class CheckpointOptions:
    """Settings for reading an original checkpoint: see :func:`bidm_cli.checkpoints.open.load_checkpoint`."""

    config: Path | None = None
    ema: bool = True
    family: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    first_stage: Path | None = None

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``load_checkpoint`` and ``open_model``: those that were asked for."""
        usual = CheckpointOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(usual, name)}


def _made(assignments: tuple[str, ...], no_ema: bool = False, **values: Any) -> CheckpointOptions:
    from bidm_cli.checkpoints.overrides import parse_settings

    return CheckpointOptions(ema=not no_ema, settings=parse_settings(assignments), **values)


def checkpoint_options(no_ema: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of :class:`CheckpointOptions`, as ``loading``; ``--no-ema`` if wanted."""
    raw = click.option("--no-ema", is_flag=True, help="Take the raw weights where the file has both.")
    return grouped(
        "loading",
        _made,
        path_option("--config", help="The original's own config, if not beside it."),
        click.option("--family", help="Take the file for one of this family: ldm, ddpm, openai, ..."),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="NAME=VALUE",
            help="Set what the file does not say, such as num_heads=8 or prediction=v; may be repeated.",
        ),
        path_option("--first-stage", help="The autoencoder of a model of latents, where it is another file."),
        *([raw] if no_ema else []),
    )
