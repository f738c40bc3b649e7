"""Progress of long work: one protocol for training, drawing samples and measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reporter:
    """Callbacks for progress; the command line draws bars with them.

    Attributes:
        stage: called with a name and the number of steps in it, before it begins.
        advance: called after each step, with a row of the training log now and then, else None.
        say: called with a line on how data or conditions were taken.
        compiling: called with pieces of a line, while kernels are compiled.
    """

    stage: Callable[[str, int], None] = lambda name, total: None
    advance: Callable[[Any], None] = lambda row: None
    say: Callable[[str], None] = lambda line: None
    compiling: Callable[[str], None] = lambda text: None
