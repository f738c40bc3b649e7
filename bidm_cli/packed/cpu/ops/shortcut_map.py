"""Shortcut maps: input positions averaged over a stride, then cropped or repeated to the output."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """One axis of a shortcut map.

    Attributes:
        pool: input positions averaged per map position. size: map positions, the last one's pool cut short.
        reads: int32 [output positions], the map position each output position takes.
    """

    pool: int
    size: int
    reads: np.ndarray


def shortcut_axis(size: int, out: int, stride: int, repeat: int = 1) -> Axis | None:
    """Map ``size`` input positions to ``out`` output positions, as :func:`functional.resize_to` does.

    ``repeat``: factor of a virtual upsample before the layer. None where a strided layer has more output than
    map positions, or a virtual upsample before it.
    """
    if repeat > 1:
        axis = shortcut_axis(repeat * size, out, stride)
        return None if axis is None or axis.pool > 1 else Axis(1, size, axis.reads // np.int32(repeat))
    positions = -(-size // stride)
    if out <= positions:
        return Axis(stride, positions, np.arange(out, dtype=np.int32))
    if stride > 1:
        return None
    # Nearest neighbour in float32, as torch computes it.
    step = np.float32(size) / np.float32(out)
    nearest = (np.arange(out, dtype=np.float32) * step).astype(np.int32)
    return Axis(1, size, np.minimum(nearest, np.int32(size - 1)))
