"""Workspaces and execution plans, one set per thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from bidm_cli.packed.cpu.runtime.threads import not_capturing

Made = TypeVar("Made")


class Workspaces(threading.local):
    """Workspaces of the calling thread's kernels, made on first use and freed when the thread ends.

    At most ``MOST`` entries per thread; the one unused for the longest time goes first.

    Entries never lie in the memory of a capture: a capture may take memory that an earlier one uses only for
    a while, and replays of that one write there again.
    """

    MOST = 256

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The calling thread's entry for ``key``."""
        found = self._made.pop(key, None)
        if found is None:
            with not_capturing():
                found = make()
        self._made[key] = found
        if len(self._made) > self.MOST:
            del self._made[next(iter(self._made))]
        return found

    def numbers(self, name: str, size: int) -> Tensor:
        """The calling thread's float32 workspace of this name, at least ``size`` numbers of earlier use.

        All layers use it one after the other; it is as large as the largest needs.
        """
        found = self._made.get(name)
        if found is not None and found.numel() < size:
            del self._made[name]
        return self.get(name, lambda: torch.zeros(size))

    def zeros(self, size: int) -> Tensor:
        """Float32 zeros, which nobody writes to."""
        return self.get(("zeros", size), lambda: torch.zeros(size))


WORKSPACES = Workspaces()
"""Workspaces that the layers of a thread share."""
