"""Contexts and conditioning channels from files or tensors (``context``, ``condition``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from bidm_cli.data.arrays import read_array
from bidm_cli.data.concat import channels_from
from bidm_cli.diffusion.condition import ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError

Source = str | Path | Tensor
"""A file, or its content."""
Model = TypeVar("Model", bound=DiffusionModel)

_CONTEXT_NAMES = ("context", "embeddings", "arr_0")


@dataclass(frozen=True)
class ConditionSource:
    """Files or tensors that images are conditioned on besides classes; None for none.

    Attributes:
        context: embeddings [L, D] or [n, L, D]: a tensor, .npy, .npz or .safetensors.
        unconditional_context: the empty prompt's, [L, D] or [1, L, D]; None leaves the model's own.
        condition: conditioning channels; see :func:`bidm_cli.data.concat.channels_from`.
        mask: of inpainting, beside the images of ``condition``.
    """

    context: Source | None = None
    unconditional_context: Source | None = None
    condition: Source | None = None
    mask: Source | None = None


def gather(model: Model, source: ConditionSource) -> tuple[Model, ConditionSet]:
    """(the model, with the null context if one is given; the conditions, checked for it).

    Raises:
        BidmError: a file that cannot be read, or that holds something else than the model takes.
    """
    notes: list[str] = []
    if source.unconditional_context is not None:
        null = _embeddings(source.unconditional_context, "`unconditional_context`")
        model = model.with_null_context(null)  # type: ignore[assignment]
    context = None if source.context is None else _embeddings(source.context, "`context`")
    concat = None
    if source.condition is not None:
        concat = channels_from(model, source.condition, source.mask, notes)
    elif source.mask is not None:
        raise BidmError("`mask` goes with `condition`, the images to fill in")
    if context is not None and model.context_width is None:
        raise BidmError("this model attends to no context; leave out `context`")
    return model, ConditionSet(context, concat, tuple(notes))


def _embeddings(source: Source, option: str) -> Tensor:
    """Floats [n, L, D]; n is 1 for [L, D]."""
    if isinstance(source, Tensor):
        values, where = source.detach().cpu(), ""
    else:
        values, where = read_array(source, option, _CONTEXT_NAMES), f"{source}: "
    if values.dim() not in (2, 3) or not values.is_floating_point() or not values.numel():
        raise BidmError(
            f"{where}{option} is {str(values.dtype).removeprefix('torch.')} {shape_text(values.shape)}; it "
            "has to be floats [L, D] or [n, L, D]"
        )
    return values.float()[None] if values.dim() == 2 else values.float()
