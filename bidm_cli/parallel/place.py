"""Place of this process among those of one run, from the variables that torchrun and ``processes`` set.

Nothing here imports torch: the command line asks before it chooses its threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from bidm_cli.errors import BidmError

LAUNCHED = "BIDM_LAUNCHED"
"""Environment variable: set in processes that :func:`bidm_cli.parallel.launch.launch` started."""
LOST = 3
"""Exit status of a process that ends because another one of its run did."""
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class ProcessLost(BidmError):
    """Another process of the run ended or cannot be reached."""


@dataclass(frozen=True)
class Place:
    """Number of a process from 0, of how many; the same on its own machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def own_place() -> Place:
    """Place of this process; alone unless RANK, WORLD_SIZE and LOCAL_RANK are all set.

    Raises:
        BidmError: they are no numbers, or do not fit each other.
    """
    if not all(name in os.environ for name in _NEEDED):
        return Place()
    values = [os.environ[name] for name in _NEEDED]
    values.append(os.environ.get("LOCAL_WORLD_SIZE", values[1]))
    try:
        rank, size, local_rank, local_size = map(int, values)
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise ValueError
    except ValueError:
        said = ", ".join(f"{name}={value}" for name, value in zip(_NEEDED, values, strict=False))
        raise BidmError(f"{said} (environment) name no process of a run; start it with torchrun") from None
    return Place(rank, size, local_rank, local_size)


_claim: Callable[[], bool] | None = None


def settle_claim(claim: Callable[[], bool] | None) -> None:
    """Let ``claim`` decide which process says why the run ends; None for a process on its own."""
    global _claim
    _claim = claim


def is_first_to_fail() -> bool:
    """True in one process of a run alone: the one that says why it ends."""
    return _claim is None or _claim()
