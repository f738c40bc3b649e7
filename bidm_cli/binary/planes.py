"""Activation planes: binary activations as a sum of sign planes, each the signs of what the others left over.

    z_1 = I + tau,   b_i = sign(z_i),   z_(i+1) = z_i - delta_i b_i,   activation = b_1 + g_1 b_2 + g_2 b_3

delta is one number per input channel and g one per layer for each further plane; the weights are the same for
all planes. Residual binarization as in HORQ (arXiv 1708.08687) and ReBNet (arXiv 1711.01243), with offsets
and scales learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

INITIAL_OFFSETS = (1.0, 0.5)
INITIAL_SCALES = (0.5, 0.25)
"""delta and g of the second and third plane at the start of training."""


def sign_planes(z: Tensor, offsets: Sequence[Tensor], sign: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Planes b_1, b_2, ... [like z] of z = I + tau, one more than there are ``offsets``.

    Args:
        offsets: delta_i, each in a shape that broadcasts over z.
        sign: gives +1 and -1; with a gradient in training, which reaches delta and z through each plane's
            own argument, not through the planes before it.
    """
    planes = [sign(z)]
    for offset in offsets:
        z = z - offset * planes[-1].detach()
        planes.append(sign(z))
    return planes


def plane_sum(values: Sequence[Tensor], scales: Tensor | None) -> Tensor:
    """values[0] + g_1 values[1] + g_2 values[2], added in this order; ``scales`` is g [planes - 1]."""
    total = values[0]
    for value, scale in zip(values[1:], () if scales is None else scales, strict=True):
        total = total + scale * value
    return total


def gradient_share(scales: Tensor) -> Tensor:
    """1 / (1 + |g_1| + |g_2|), a scalar: share of the gradient of the planes' sum passed on in training.

    Two planes' surrogate gradients add up to more than one plane's, while with g near 1 most of their sums
    are near 0: without the share gradients grow from layer to layer. On the bundled LDM-4 (67 binary layers)
    their norm was some 300 times that of one plane. Found here, not in a paper.

    Args:
        scales: g [planes - 1].
    """
    return 1 / (1 + scales.detach().abs().sum())


def scaled_gradient(value: Tensor, share: Tensor) -> Tensor:
    """``value`` (any shape, finite) to the bit, with ``share`` (a scalar) of its gradient."""
    constant = value.detach()
    return constant + share * (value - constant)


def initial_offsets(planes: int, channels: int, **like: object) -> Tensor:
    """delta [planes - 1, channels] at the start of training."""
    column = torch.tensor(INITIAL_OFFSETS[: planes - 1], **like)  # type: ignore[arg-type]
    return column[:, None].repeat(1, channels)


def initial_scales(planes: int, **like: object) -> Tensor:
    """g [planes - 1] at the start of training."""
    return torch.tensor(INITIAL_SCALES[: planes - 1], **like)  # type: ignore[arg-type]
