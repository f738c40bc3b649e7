"""Recorder protocol, and what a recording gives: shared by the denoiser and the recorders of each device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Recorded(NamedTuple):
    """Result of recording a step.

    Attributes:
        replay: computes the step anew, from the same tensors into those it wrote to when it was recorded;
            None if it cannot be done again.
        output: what the step returned, renewed by each replay.
        ran: whether recording has run the step: output and features are those of the inputs.
        problem: why there is no replay.
    """

    replay: Callable[[], None] | None
    output: Tensor
    ran: bool
    problem: str = ""


class CannotRecord(Exception):
    """Raised if a step cannot be recorded; what it was to compute is undefined."""


class Recorder(Protocol):
    """Recorder of a function's operations; a parameter so that the bookkeeping can be tested without a GPU.

    Attributes:
        what: a recording's name, for people. runs_first: whether the function has to have run before.
    """

    what: str
    runs_first: bool

    def __call__(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recorded:
        """Record ``run``, which reads ``inputs`` (numbers change between replays) and may write to them.

        Raises:
            CannotRecord: see there.
        """
