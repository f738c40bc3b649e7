"""Recorder protocol and captured steps, shared by the denoiser and the recorders of each device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Recorded(NamedTuple):
    """A captured step.

    Attributes:
        replay: computes the step again, from the same tensors into those of the capture; None if it cannot be
            replayed. output: result of the step, renewed by each replay.
        problem: why there is no replay.
    """

    replay: Callable[[], None] | None
    output: Tensor
    problem: str = ""


class CannotRecord(Exception):
    """Raised if a step cannot be captured; the tensors it writes to are undefined."""


class Recorder(Protocol):
    """Captures a function's operations; a parameter so that the bookkeeping can be tested without a GPU.

    Attributes:
        what: name of a capture, for messages.
        runs_first: True if the function must have run before; the capture then runs it on its inputs, too.
    """

    what: str
    runs_first: bool

    def __call__(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recorded:
        """Capture ``run``, which reads ``inputs`` (values change between replays) and may write to them.

        Raises:
            CannotRecord: see there.
        """
