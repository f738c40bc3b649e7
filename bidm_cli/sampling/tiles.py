"""Decoding of large latents in tiles, so that a decoder's memory stays bounded.

    images = in_tiles(decode, z)        # decode(z) up to LARGEST positions

Norms and attention of a decoder see one tile at a time, so colours may differ slightly between tiles;
neighbours overlap and are blended linearly.
"""

from __future__ import annotations

import warnings
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
    warnings.warn(
        f"latents of {height}x{width} are decoded in overlapping tiles of {SIDE}x{SIDE} to save memory; "
        "colours may differ a little from tile to tile",
        stacklevel=2,
    )
    images, weights = None, None
    for top in starts(height):
        for left in starts(width):
            part = decode(z[:, :, top : top + SIDE, left : left + SIDE])
            factor = part.shape[2] // min(SIDE, height)
            if images is None or weights is None:
                images = part.new_zeros(*part.shape[:2], factor * height, factor * width)
                weights = part.new_zeros(factor * height, factor * width)
            down, across = (
                ramp(size, factor, start == 0, start + SIDE >= whole)
                for size, start, whole in ((part.shape[2], top, height), (part.shape[3], left, width))
            )
            weight = down[:, None] * across
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


def ramp(size: int, factor: int, is_first: bool, is_last: bool) -> Tensor:
    """Weights [size] of a tile's pixels along one axis: 1, less where one before or after overlaps it."""
    place = (torch.arange(size) + 0.5) / (OVERLAP * factor)
    rising = torch.ones(size) if is_first else place.clamp(max=1.0)
    return rising if is_last else torch.minimum(rising, place.flip(0))
