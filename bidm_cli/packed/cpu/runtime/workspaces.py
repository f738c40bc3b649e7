"""Workspaces and execution plans, one set per thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Made = TypeVar("Made")


class Workspaces(threading.local):
    """Workspaces of the calling thread's kernels, made on first use and freed when the thread ends.

    At most ``MOST`` entries per thread; the one unused for the longest time goes first.
    """

    MOST = 256

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The calling thread's entry for ``key``."""
        found = self._made.pop(key, None)
        if found is None:
            found = make()
        self._made[key] = found
        if len(self._made) > self.MOST:
            del self._made[next(iter(self._made))]
        return found


WORKSPACES = Workspaces()
"""Workspaces that the layers of a thread share."""
