"""Seam for kernel fusion: a layer with the norm before it, the sums after it, and inputs read in place.

    h = fused_conv(conv1, x, prologue=Prologue(norm1, silu=True), offset=time)
    y = fused_conv(conv2, h, prologue=Prologue(norm2, silu=True), residual=shortcut(skip, x))

A layer that can do all of this in one call has a method ``fuses(prologue)`` that says so; it is called as
``layer(x, Fused(prologue, upsample, offset, residual))``. If it reads parts and small pixels in place, its
``reads_virtual`` is true. Every other layer is called on a tensor, between the same operations in torch. A
norm with a method ``fuses`` applies a whole prologue in one call, ``norm(x, prologue)``.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features: TypeAlias = Tensor | tuple[Tensor, ...]
"""A tensor, or a virtual concat: tensors [N, C_i, H, W] that stand for their concatenation."""


class Prologue(NamedTuple):
    """Operations on a layer's input: a norm, then FiLM, SiLU and dropout, where present.

        I = dropout(silu(norm(x) * (1 + scale) + shift))

    Attributes:
        norm: a group norm, or lucidrains' RMS norm. silu: whether SiLU follows.
        scale, shift: [N, C], both or neither.
        dropout: for training; layers and norms that fuse leave it out.
    """

    norm: nn.Module
    silu: bool = False
    scale: Tensor | None = None
    shift: Tensor | None = None
    dropout: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The prologue alone, on x [N, C, ...]."""
        if fuses(self.norm, self):
            return self.norm(x, self)
        x = self.norm(x)
        if self.scale is not None and self.shift is not None:
            ones = [1] * (x.dim() - 2)
            x = x * (1 + self.scale.unflatten(1, (-1, *ones))) + self.shift.unflatten(1, (-1, *ones))
        x = F.silu(x) if self.silu else x
        return x if self.dropout is None else self.dropout(x)


class Fused(NamedTuple):
    """Operations around a layer that it runs in the same call.

    Attributes:
        upsample: nearest neighbour upsampling by this factor, after the prologue.
        offset: [N, O], added to all positions of an image. residual: in the result's shape.
    """

    prologue: Prologue | None = None
    upsample: int = 1
    offset: Tensor | None = None
    residual: Tensor | None = None


NOTHING = Fused()


def fused_conv(
    conv: nn.Module,
    x: Features,
    *,
    prologue: Prologue | None = None,
    upsample: int = 1,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + conv(upsampled prologue(x)) + offset, as :class:`Fused`; in one call if ``conv`` can."""
    if prologue is not None and (upsample > 1 or not fuses(conv, prologue)):
        x, prologue = prologue(joined(x)), None
    if fuses(conv, prologue):
        return conv(x, Fused(prologue, upsample, offset, residual))
    y = conv(upsampled(joined(x), upsample))
    if offset is not None:
        y = y + offset[:, :, None, None]
    return y if residual is None else residual + y


def shortcut(
    layer: nn.Module | None, x: Features, upsample: int = 1, residual: Tensor | None = None
) -> Tensor:
    """x, upsampled, through a residual block's shortcut layer if it has one; added to ``residual``."""
    if layer is not None and not isinstance(layer, nn.Identity):
        return fused_conv(layer, x, upsample=upsample, residual=residual)
    whole = upsampled(joined(x), upsample)
    return whole if residual is None else residual + whole


def read_in_place(conv: nn.Module, x: Features) -> Features:
    """x as it is if ``conv`` reads it so, else its tensor: concatenated once for all who read it."""
    return x if getattr(conv, "reads_virtual", False) else joined(x)


def joined(x: Features) -> Tensor:
    """The tensor that x stands for."""
    return x if isinstance(x, Tensor) else torch.cat(x, dim=1)


def upsampled(x: Tensor, factor: int) -> Tensor:
    """x [N, C, H, W] at ``factor`` times the size by nearest neighbour."""
    return x if factor == 1 else F.interpolate(x, scale_factor=float(factor), mode="nearest")


def fuses(module: nn.Module, prologue: Prologue | None = None) -> bool:
    """True if a layer or norm takes the prologue, and a layer offset and residual, in one call."""
    ask = getattr(module, "fuses", None)
    return ask is not None and ask(prologue)
