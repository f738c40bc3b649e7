"""Options on prompts, and the embeddings that take their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bidm_cli.cli.options import grouped, path_option
from bidm_cli.errors import BidmError

if TYPE_CHECKING:
    from bidm_cli.data.condition_files import ConditionSource


@dataclass(frozen=True)
class TextOptions:
    """Places of what embeds prompts; None takes the original and the tokenizer beside it."""

    text_encoder: Path | None = None
    tokenizer: Path | None = None


text_options = grouped(
    "text",
    f"{__name__}:TextOptions",
    path_option(
        "--text-encoder",
        help="A checkpoint or diffusers folder with the text encoder.  [default: the original itself]",
    ),
    path_option(
        "--tokenizer",
        help="Folder of the tokenizer.  [default: beside the encoder, or transformers' cache]",
    ),
)


def embed_prompts(
    conditions: ConditionSource, prompts: Sequence[str], empty: str | None, model: Path, text: TextOptions
) -> ConditionSource:
    """``conditions`` with the prompts' embeddings as its contexts.

    Args:
        empty: prompt that guidance leads away from; None is the empty one.
        model: the file sampled or compressed, which has the text encoder if it is an original.

    Raises:
        BidmError: something that prompts need is missing.
    """
    from bidm_cli.checkpoints.text import encode_prompts
    from bidm_cli.packed.format.container import is_packed

    if not prompts:
        if empty is not None:
            raise click.UsageError("--negative-prompt goes with --prompt")
        return conditions
    if conditions.context is not None:
        raise click.UsageError("prompts and --context exclude each other")
    if text.text_encoder is None and model.is_file() and is_packed(model):
        raise BidmError(
            f"{model} is packed, without a text encoder; name its original or a diffusers folder with "
            "--text-encoder, or give ready embeddings with --context"
        )
    embedded = encode_prompts(text.text_encoder or model, [*prompts, empty or ""], text.tokenizer)
    unconditional = conditions.unconditional_context
    if unconditional is None:
        unconditional = embedded[-1]
    return replace(conditions, context=embedded[:-1], unconditional_context=unconditional)
