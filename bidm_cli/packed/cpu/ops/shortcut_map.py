"""Where a shortcut reads: input pixels averaged over a stride, then cropped or repeated to the output."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """One axis of a shortcut.

    Attributes:
        cell: input positions that are averaged. cells: how many such cells there are, the last cut short.
        reads: int32 [output positions], the cell each output position takes.
    """

    cell: int
    cells: int
    reads: np.ndarray


def shortcut_axis(size: int, out: int, stride: int, repeat: int = 1) -> Axis | None:
    """The axis of ``size`` input and ``out`` output positions, as :func:`functional.resize_to` has it.

    ``repeat``: the layer sees each input position so many times in a row. None where a strided layer's output
    is larger than its cells are many, or a strided layer's input is repeated.
    """
    if repeat > 1:
        axis = shortcut_axis(repeat * size, out, stride)
        return None if axis is None or axis.cell > 1 else Axis(1, size, axis.reads // np.int32(repeat))
    cells = -(-size // stride)
    if out <= cells:
        return Axis(stride, cells, np.arange(out, dtype=np.int32))
    if stride > 1:
        return None
    # Nearest neighbour in float32, as torch computes it.
    step = np.float32(size) / np.float32(out)
    nearest = (np.arange(out, dtype=np.float32) * step).astype(np.int32)
    return Axis(1, size, np.minimum(nearest, np.int32(size - 1)))
