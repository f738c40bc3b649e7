"""Memory arena for captured steps: replays find their tensors at the same addresses.

Memory is freed as the tensors in it die, and used again by later ones of the same capture, as in the private
pool of a CUDA graph: a replay does the same operations in the same order, so it may use the same addresses.
Only living tensors outlast a capture, so all captures of a model share one arena. What has to keep its
numbers from one replay to the next is made outside of captures: later captures get memory that replays of
earlier ones write to.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 128
"""Alignment of tensors in bytes: two cache lines."""

SEGMENT = 1 << 24
"""Least bytes per request to the system; pages that are never touched cost nothing."""


def trim_heap() -> None:
    """Return freed memory to the system, where its C library can; a capture takes memory of its own."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Arena:
    """Tensors in memory that is not returned to the system."""

    def __init__(self) -> None:
        self._segments: list[tuple[int, np.ndarray]] = []
        self._free: list[tuple[int, int]] = []  # (address, bytes), by address; neighbours are joined

    def tensor(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor whose memory is its own until the last view of it dies."""
        reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        size = max(1, 0 if 0 in shape else reach) * dtype.itemsize
        place = self._take(-(-size // ALIGNMENT) * ALIGNMENT)
        return torch.from_numpy(place)[:size].view(dtype).as_strided(tuple(shape), tuple(stride))

    def owns(self, tensor: Tensor) -> bool:
        """True if the tensor lies in this arena."""
        return self._segment(tensor.untyped_storage().data_ptr()) is not None

    def alias(self, tensor: Tensor) -> Tensor:
        """The same tensor without keeping its memory: for operations that are replayed."""
        # Not data_ptr(), which is 0 for a tensor without numbers.
        offset = int(tensor.storage_offset()) * tensor.dtype.itemsize
        address = tensor.untyped_storage().data_ptr() + offset
        start, segment = self._segments[self._segment(address)]  # type: ignore[index]
        whole = torch.from_numpy(segment).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), (address - start) // tensor.dtype.itemsize)

    def _segment(self, address: int) -> int | None:
        holds = (
            i for i, (start, piece) in enumerate(self._segments) if start <= address < start + len(piece)
        )
        return next(holds, None)

    def _take(self, size: int) -> np.ndarray:
        """``size`` bytes: from the smallest free place that is large enough."""
        fits = [(length, address) for address, length in self._free if length >= size]
        if not fits:
            self._add_segment(size)
            return self._take(size)
        length, address = min(fits)
        self._free.remove((address, length))
        if length > size:
            bisect.insort(self._free, (address + size, length - size))
        start, segment = self._segments[self._segment(address)]  # type: ignore[index]
        place = segment[address - start : address - start + size]
        weakref.finalize(place, self._give_back, address, size).atexit = False
        return place

    def _add_segment(self, size: int) -> None:
        space = np.empty(max(size, SEGMENT) + ALIGNMENT, np.uint8)
        skipped = -space.ctypes.data % ALIGNMENT
        segment = space[skipped : skipped + max(size, SEGMENT)]
        self._segments.append((segment.ctypes.data, segment))
        bisect.insort(self._free, (segment.ctypes.data, len(segment)))

    def _give_back(self, address: int, size: int) -> None:
        at = bisect.bisect(self._free, (address, size))
        starts = {start for start, _ in self._segments}  # neighbours of two segments stay apart
        if at < len(self._free) and self._free[at][0] == address + size and address + size not in starts:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == address and address not in starts:
            address, before = self._free.pop(at - 1)
            size += before
        bisect.insort(self._free, (address, size))
