"""Share of a batch: the rows that one process, or one micro-batch, takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Rows ``index``, ``index + count``, ... of a batch.

    Every ``count``-th row rather than a block: rows that cost less, such as those trained without a step
    before, stand at the front of a batch and are dealt out evenly.
    """

    index: int = 0
    count: int = 1

    def of(self, values: Tensor) -> Tensor:
        """Rows of ``values`` [N, ...] that belong to it, [ceil((N - index) / count), ...]."""
        return values if self.count == 1 else values[self.index :: self.count].contiguous()

    def rows(self, total: int) -> int:
        """Number of its rows among the first ``total``."""
        return len(range(self.index, total, self.count))


WHOLE = Share()
"""The share of a process on its own: all rows."""
