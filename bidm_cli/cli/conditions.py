"""Options that say what images are conditioned on, shared by the commands that sample, train or compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bidm_cli.errors import BidmError

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


_PROMPT_OPTIONS = (
    click.option(
        "--text-encoder",
        type=click.Path(path_type=Path),
        help="A checkpoint or diffusers folder with the text encoder.  [default: the original itself]",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="Folder of the tokenizer.  [default: beside the encoder, or transformers' cache]",
    ),
)


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--text-encoder`` and ``--tokenizer`` to a command that takes prompts."""
    for option in reversed(_PROMPT_OPTIONS):
        command = option(command)
    return command


def embed_prompts(
    given: dict[str, Any],
    prompts: Sequence[str],
    empty: str | None,
    model: Path,
    text_encoder: Path | None,
    tokenizer: Path | None,
) -> dict[str, Any]:
    """``given`` (of :func:`take_conditions`) with the prompts' embeddings as its contexts.

    Args:
        empty: what guidance compares with; None is the empty prompt.
        model: the file sampled or compressed, which has the text encoder if it is an original.

    Raises:
        BidmError: something that prompts need is missing.
    """
    from bidm_cli.checkpoints.text import encode_prompts
    from bidm_cli.packed.format.container import is_packed

    if not prompts:
        if empty is not None:
            raise click.UsageError("--negative-prompt goes with --prompt")
        return given
    if given["context"] is not None:
        raise click.UsageError("prompts and --context exclude each other")
    if text_encoder is None and model.is_file() and is_packed(model):
        raise BidmError(
            f"{model} is packed, without a text encoder; name its original or a diffusers folder with "
            "--text-encoder, or give ready embeddings with --context"
        )
    embedded = encode_prompts(text_encoder or model, [*prompts, empty or ""], tokenizer)
    unconditional = given["unconditional_context"]
    if unconditional is None:
        unconditional = embedded[-1]
    return {**given, "context": embedded[:-1], "unconditional_context": unconditional}
