"""Progress of long work: one protocol for training, drawing samples and measuring."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reporter:
    """Callbacks for progress; the command line draws bars with them.

    Attributes:
        stage: called with a name and the number of steps in it, before it begins.
        advance: called after each step, with a row of the training log now and then, else None.
        begin: called once with what is about to be done, before any of it.
        say: called with a line on how data or conditions were taken.
        pace: called with the seconds per step of a training and the steps that are left, once they are known.
        compiling: called with pieces of a line, while kernels are compiled.
    """

    stage: Callable[[str, int], None] = lambda name, total: None
    advance: Callable[[Any], None] = lambda row: None
    begin: Callable[[Any], None] = lambda plan: None
    say: Callable[[str], None] = lambda line: None
    pace: Callable[[float, int], None] = lambda seconds, left: None
    compiling: Callable[[str], None] = lambda text: None


class Pace:
    """Seconds per step of a loop of ``total`` steps, reported once: mean of ten steps after the first, which
    fills caches.
    """

    STEPS = 10

    def __init__(self, total: int, tell: Callable[[float, int], None]) -> None:
        self._total, self._tell, self._done, self._began = total, tell, 0, 0.0

    def advance(self) -> None:
        """Count a step that is done."""
        self._done += 1
        if self._done == 1:
            self._began = time.monotonic()
        elif self._done == 1 + self.STEPS < self._total:
            self._tell((time.monotonic() - self._began) / self.STEPS, self._total - self._done)
