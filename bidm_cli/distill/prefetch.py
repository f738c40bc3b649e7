"""Prefetching of the next step's batch and teacher targets in a background thread.

with Prefetcher(make, first=0, end=1000, device=model.device) as prefetched:
    targets = prefetched.take()     # make(0); make(1) runs meanwhile
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

FEWEST_THREADS = 4
"""Threads from which on a part of them is set aside for prefetching. With two, a step of ``w1a1`` took 7 to
9 % longer than with both for either half in turn (benchmarks/results/train_step.md)."""


class Prefetcher(Generic[T]):
    """Results of ``make(first)``, ``make(first + 1)``, ... in order, each begun when the one before is taken.

    On a CPU with :data:`FEWEST_THREADS` or more a quarter of them goes to ``make`` and the others to the
    caller until the block ends: about what the teacher's share of a training step is. Elsewhere ``make`` runs
    when its result is taken. Results do not depend on which.

    Args:
        make: called with the numbers from ``first`` to before ``end``, from one thread at a time.
    """

    def __init__(self, make: Callable[[int], T], first: int, end: int, device: torch.device) -> None:
        self._make, self._next, self._end = make, first, end
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._begun: Future[T] | None = None
        if device.type == "cpu" and self._threads >= FEWEST_THREADS:
            share = self._threads // 4
            self._pool = ThreadPoolExecutor(1, "bidm-prefetch", torch.set_num_threads, (share,))
            self._rest = self._threads - share

    def __enter__(self) -> Prefetcher[T]:
        if self._pool is not None:
            self._begin(self._pool)
            torch.set_num_threads(self._rest)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._threads)

    def take(self) -> T:
        """The next result. Raises what ``make`` raised."""
        if self._pool is None:
            self._next += 1
            return self._make(self._next - 1)
        assert self._begun is not None, "nothing left to take"
        result = self._begun.result()
        self._begin(self._pool)
        return result

    def _begin(self, pool: ThreadPoolExecutor) -> None:
        self._begun = pool.submit(self._make, self._next) if self._next < self._end else None
        self._next += 1
