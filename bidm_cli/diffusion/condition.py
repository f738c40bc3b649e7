"""Conditions of a network: a context to attend to, labels, channels joined to its input.

    condition = model.make_condition(labels, Condition(context=embeddings))     # checked, on its device
    output = model.denoise(condition.join(x), t, condition.context, condition.y)

A :class:`ConditionSet` holds the conditions of many images; each image or training step takes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bidm_cli.errors import BidmError
from bidm_cli.transfer import to_device


@dataclass(frozen=True)
class Condition:
    """Condition of one batch, one row per image; None for what the network does not take.

    Attributes:
        context: embeddings that it attends to, [N, L, D].
        y: labels that it embeds itself, [N].
        concat: channels joined to x, [N, K, H, W].
    """

    context: Tensor | None = None
    y: Tensor | None = None
    concat: Tensor | None = None

    def join(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] with the conditioning channels after its own, [N, C + K, H, W]."""
        return x if self.concat is None else torch.cat([x, self.concat.to(x)], dim=1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """``change`` applied to whatever there is."""
        context, y, concat = (None if v is None else change(v) for v in (self.context, self.y, self.concat))
        return Condition(context, y, concat)

    def mixed(self, other: Condition, chosen: Tensor) -> Condition:
        """The rows of ``other`` where ``chosen`` [N] is true, else these; contexts of one length."""

        def mix(own: Tensor | None, others: Tensor | None) -> Tensor | None:
            if own is None or others is None:
                return own
            return torch.where(to_device(chosen, own.device).reshape(-1, *[1] * (own.dim() - 1)), others, own)

        return Condition(
            mix(self.context, other.context), mix(self.y, other.y), mix(self.concat, other.concat)
        )


@dataclass(frozen=True)
class ConditionSet:
    """Conditions of many images besides their classes; numbers beyond the last row start over.

    Attributes:
        context: [M, L, D]. concat: [M, K, H, W]. One of them may have a single row, which serves all.
        notes: what was read and how it was taken, a line each.
        paired: context k belongs to sample k of the training data; otherwise training draws them at random.
    """

    context: Tensor | None = None
    concat: Tensor | None = None
    notes: tuple[str, ...] = ()
    paired: bool = False

    def __post_init__(self) -> None:
        if self.context is None or self.concat is None:
            return
        contexts, conditions = len(self.context), len(self.concat)
        if contexts != conditions and 1 not in (contexts, conditions):
            raise BidmError(
                f"`context` holds {contexts} rows, `condition` {conditions}; give as many of each, or one"
            )

    def __len__(self) -> int:
        """Rows; 0 if nothing is given."""
        return max((len(part) for part in (self.context, self.concat) if part is not None), default=0)

    def take(self, numbers: Sequence[int] | Tensor) -> Condition:
        """The rows of images ``numbers`` [N]."""
        wanted = torch.as_tensor(numbers, dtype=torch.long).cpu()

        def rows(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[wanted % len(part)]

        return Condition(context=rows(self.context), concat=rows(self.concat))

    @property
    def whole(self) -> Condition:
        """All rows as they are, for checks."""
        return Condition(context=self.context, concat=self.concat)


def check_context(context: Tensor | None, width: int | None, needed: bool) -> None:
    """Raise BidmError unless ``context`` [N, L, D] is what a network of context width ``width`` takes."""
    if context is None:
        if needed:
            raise BidmError(
                "this model attends to a context (a text embedding, say); give `context`, embeddings "
                f"[L, {width}] or [n, L, {width}]"
            )
        return
    if width is None:
        raise BidmError("this model attends to no context; leave out `context`")
    if context.dim() != 3 or context.shape[2] != width or not context.numel():
        raise BidmError(
            f"the context is {shape_text(context.shape)}; this model takes embeddings [L, {width}] or "
            f"[n, L, {width}] (`context`)"
        )
    if not bool(torch.isfinite(context).all()):
        raise BidmError("the context holds values that are not finite (`context`)")


def check_concat(concat: Tensor | None, channels: int, size: tuple[int, int]) -> None:
    """Raise BidmError unless ``concat`` [N, K, H, W] fits a network with ``channels`` more inputs."""
    shape = (channels, *size)
    if concat is None:
        if channels:
            raise BidmError(
                f"this model is conditioned on {channels} channels joined to its input; give `condition`, an "
                f"image, a folder of them, or an array [n, {', '.join(map(str, shape))}]"
            )
        return
    if not channels:
        raise BidmError("this model takes no conditioning channels; leave out `condition`")
    if concat.dim() != 4 or tuple(concat.shape[1:]) != shape or not len(concat):
        raise BidmError(
            f"the condition is {shape_text(concat.shape)}; this model takes {shape_text(('n', *shape))} "
            "(`condition`)"
        )
    if not bool(torch.isfinite(concat).all()):
        raise BidmError("the condition holds values that are not finite (`condition`)")


def shape_text(shape: Sequence[int | str]) -> str:
    """A shape as messages show it: [77, 768]."""
    return "[" + ", ".join(str(size) for size in shape) + "]"
