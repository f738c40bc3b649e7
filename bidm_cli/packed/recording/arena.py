"""Memory whose places stay: what a recorded step allocates, so that replays find their tensors again.

    arena = Arena()
    x = arena.tensor((2, 3), (3, 1), torch.float32)
    del x                                        # its place may be given out again

Places are freed as the tensors in them die, and used again by those that come later in the same recording, as
in the private pool of a CUDA graph: a replay does the same things in the same order, so it may do them in the
same places. Between recordings nothing needs to be kept but what still lives, so all of a model's recordings
share one arena.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 128
"""Bytes between the starts of places: two lines of a cache."""

SEGMENT = 1 << 24
"""Least bytes to ask the system for; pages that are never touched cost nothing."""


class Arena:
    """Tensors in memory that is not given back to the system."""

    def __init__(self) -> None:
        self._segments: list[tuple[int, np.ndarray]] = []
        self._free: list[tuple[int, int]] = []  # (address, bytes), by address; neighbours are joined

    def tensor(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor in a place of its own until the last view of it dies."""
        reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        size = max(1, 0 if 0 in shape else reach) * dtype.itemsize
        place = self._take(-(-size // ALIGNMENT) * ALIGNMENT)
        return torch.from_numpy(place)[:size].view(dtype).as_strided(tuple(shape), tuple(stride))

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in this arena."""
        return self._segment(tensor.untyped_storage().data_ptr()) is not None

    def alias(self, tensor: Tensor) -> Tensor:
        """The same numbers, without keeping their place: for work that a recording does again."""
        # Not data_ptr(), which is 0 for a tensor without numbers.
        offset = int(tensor.storage_offset()) * tensor.dtype.itemsize
        address = tensor.untyped_storage().data_ptr() + offset
        start, segment = self._segments[self._segment(address)]  # type: ignore[index]
        whole = torch.from_numpy(segment).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), (address - start) // tensor.dtype.itemsize)

    def _segment(self, address: int) -> int | None:
        for i, (start, segment) in enumerate(self._segments):
            if start <= address < start + len(segment):
                return i
        return None

    def _take(self, size: int) -> np.ndarray:
        """A place of ``size`` bytes: the smallest free one that is large enough."""
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
        if at < len(self._free) and self._free[at][0] == address + size and self._joins(address + size):
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == address and self._joins(address):
            address, before = self._free.pop(at - 1)
            size += before
        bisect.insort(self._free, (address, size))

    def _joins(self, address: int) -> bool:
        """Whether what ends at ``address`` and what begins there are of one segment."""
        return all(start != address for start, _ in self._segments)
