"""Images read by several threads before they are needed, and handed out in order.

reader = ImageReader(read, workers=4)
reader.expect([3, 14, 15])      # begins
reader.take(3)                  # read(3), or what it raised
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
MOST_WORKERS = 8


def default_workers() -> int:
    """Threads that read: half of the cores that this process may use, up to :data:`MOST_WORKERS`.

    With two cores it is one, and images are read where they are needed: training takes both.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // 2))


class ImageReader(Generic[T]):
    """Results of ``read`` by number; with one worker they are read when they are taken."""

    def __init__(self, read: Callable[[int], T], workers: int) -> None:
        self._read, self._begun = read, dict[int, Future[T]]()
        self._pool = ThreadPoolExecutor(workers, "bidm-read") if workers > 1 else None
        if self._pool is not None:
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def expect(self, numbers: Iterable[int]) -> None:
        """Begin to read these in their order, and forget what was expected besides."""
        if self._pool is None:
            return
        before, self._begun = self._begun, {}
        for number in numbers:
            known = before.pop(number) if number in before else None
            self._begun[number] = known or self._pool.submit(self._read, number)
        for other in before.values():
            other.cancel()

    def take(self, number: int) -> T:
        """Result for a number, expected or not. Raises what ``read`` raised."""
        begun = self._begun.pop(number, None)
        return self._read(number) if begun is None else begun.result()
