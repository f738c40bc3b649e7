"""Decoding of large latents in tiles, so that a decoder's memory stays bounded.

    images = in_tiles(decode, z)        # decode(z) up to LARGEST positions

Norms and attention of a decoder see one tile at a time, so colours may differ slightly between tiles;
neighbours overlap and are blended linearly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 128 * 128
"""Most positions of latents that are decoded at once: 1024x1024 pixels where a position stands for 8x8."""

SIDE, OVERLAP = 96, 16
"""Height and width of a tile, and what neighbours share at least, in positions of latents."""


def in_tiles(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """decode(z) of latents [N, C, h, w], in overlapping tiles if they have more than LARGEST positions.

    ``decode`` makes images [N, O, f h, f w] of any size that is a multiple of f.
    """
    height, width = z.shape[2:]
    if height * width <= LARGEST:
        return decode(z)
    images, weights = None, None
    for top in starts(height):
        for left in starts(width):
            part = decode(z[:, :, top : top + SIDE, left : left + SIDE])
            factor = part.shape[2] // min(SIDE, height)
            if images is None or weights is None:
                images = part.new_zeros(*part.shape[:2], factor * height, factor * width)
                weights = part.new_zeros(factor * height, factor * width)
            weight = ramp(part.shape[2], factor)[:, None] * ramp(part.shape[3], factor)
            place = (
                slice(factor * top, factor * top + part.shape[2]),
                slice(factor * left, factor * left + part.shape[3]),
            )
            weight = weight.to(part)
            images[:, :, place[0], place[1]] += part * weight
            weights[place] += weight
    assert images is not None and weights is not None
    return images / weights


def starts(size: int) -> list[int]:
    """First positions of tiles along one axis: as few as overlap enough, evenly apart."""
    if size <= SIDE:
        return [0]
    count = -(-(size - OVERLAP) // (SIDE - OVERLAP))
    return [round(i * (size - SIDE) / (count - 1)) for i in range(count)]


def ramp(size: int, factor: int) -> Tensor:
    """Weights [size] of a tile's pixels along one axis, growing from its borders over the overlap to 1."""
    place = torch.arange(size) + 0.5
    return (torch.minimum(place, size - place) / (OVERLAP * factor)).clamp(max=1.0)
