"""Seconds that each process computes per step before it waits for the others, and those that are slow."""

from __future__ import annotations

import time
from statistics import median

import torch

LEAST_STEPS = 10
"""Steps over which a process is measured before it is called slow."""
SLOW = 1.5
"""Multiple of the others' median from which on a process is slow."""


class StepSeconds:
    """Stopwatch of a process's own part of each step; on a GPU by events, so that nothing is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = (
            [] if device.type == "cuda" else None
        )
        self._began, self._seconds, self.steps = 0.0, 0.0, 0

    def start(self) -> None:
        """Begin a step."""
        if self._events is None:
            self._began = time.perf_counter()
        else:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)

    def stop(self) -> None:
        """End the step's own part: from here on it may have to wait."""
        self.steps += 1
        if self._events is None:
            self._seconds += time.perf_counter() - self._began
        else:
            self._events[-1][1].record()

    def take(self) -> float:
        """Mean seconds per step since the last call."""
        seconds, steps = self._seconds, max(1, self.steps)
        if self._events:
            self._events[-1][1].synchronize()
            seconds = sum(first.elapsed_time(last) for first, last in self._events) / 1000
            self._events.clear()
        self._seconds, self.steps = 0.0, 0
        return seconds / steps


def slow_processes(seconds: list[float]) -> dict[int, float]:
    """Processes that take over :data:`SLOW` times the median of the others, by rank: that multiple."""
    found = {}
    for rank, own in enumerate(seconds):
        others = median(seconds[:rank] + seconds[rank + 1 :]) if len(seconds) > 1 else own
        if own > SLOW * others > 0:
            found[rank] = own / others
    return found
