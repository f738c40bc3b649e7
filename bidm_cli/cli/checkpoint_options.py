"""The options that say how to read an original checkpoint, for every command that opens one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Reading:
    """How to read an original checkpoint, beyond its own configuration: see :func:`load_checkpoint`."""

    family: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    first_stage: Path | None = None

    def given(self) -> dict[str, Any]:
        """What was asked for, as keyword arguments; empty if nothing was."""
        return {name: value for name, value in vars(self).items() if value}

    def kwargs(self) -> dict[str, Any]:
        """Itself, as :func:`bidm_cli.cli.models.open_model` takes it; empty if nothing was asked for."""
        return {"reading": self} if self.given() else {}


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--family``, ``--set`` and ``--first-stage`` to a command, which gets them as ``reading``."""

    @click.option("--family", help="Take the file for one of this family: ldm, ddpm, openai, ...")
    @click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set what the file does not say, such as num_heads=8 or prediction=v; may be repeated.",
    )
    @click.option(
        "--first-stage",
        type=click.Path(path_type=Path),
        help="The autoencoder of a model of latents, where it is another file.",
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any, family: str | None, assignments: tuple[str, ...], first_stage: Path | None, **more: Any
    ) -> Any:
        from bidm_cli.checkpoints.overrides import parse_settings

        return function(*args, reading=Reading(family, parse_settings(assignments), first_stage), **more)

    return wrapped
