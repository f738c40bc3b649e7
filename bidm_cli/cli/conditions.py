"""Options that say what images are conditioned on, shared by the commands that sample, train or compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_OPTIONS = (
    click.option(
        "--context",
        type=click.Path(path_type=Path),
        help="Embeddings [L, D] or [n, L, D] to attend to: .npy, .npz or .safetensors.",
    ),
    click.option(
        "--unconditional-context",
        type=click.Path(path_type=Path),
        help="The empty prompt's embedding [L, D], for guidance; bidm compress packs it.",
    ),
    click.option(
        "--condition",
        type=click.Path(path_type=Path),
        help="Images (a file, folder, zip or .npz) or arrays [n, C, H, W] joined to the network's input.",
    ),
    click.option(
        "--mask",
        type=click.Path(path_type=Path),
        help="Inpainting: one mask, or one for each image of --condition; white is filled in.",
    ),
)
NAMES = ("context", "unconditional_context", "condition", "mask")


def condition_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--context``, ``--unconditional-context``, ``--condition`` and ``--mask`` to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_conditions(options: dict[str, Any]) -> dict[str, Path | None]:
    """Remove the options of :func:`condition_options` from a command's and return them."""
    return {name: options.pop(name) for name in NAMES}
