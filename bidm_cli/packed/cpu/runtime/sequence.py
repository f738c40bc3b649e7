"""Launches of kernels in one go; see :mod:`bidm_cli.packed.cpu.runtime.sequence_kernel`.

program = Program(launches)      # as bidm_cli.packed.cpu.runtime.threads.listening tells of them
program.run()                    # all of them again, with the jobs they had

with gathered() as flush:        # launches in here wait
    ...
    flush()                      # and run, as they do at the end
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from bidm_cli.packed.cpu.runtime.args import HEADER_FIELDS, PROGRAM_JOB, record
from bidm_cli.packed.cpu.runtime.compile import program_launcher
from bidm_cli.packed.cpu.runtime.threads import Launched, give_way, is_listened_to, queueing

_LINE = 64
"""Jobs begin at a cache line of their own: their headers are written to by all threads."""


class Program:
    """Kernels one after the other, without Python between them.

    Args:
        launches: what to do. What the records point to has to live as long as the program.
    """

    def __init__(self, launches: Sequence[Launched]) -> None:
        pitch = -(-max(len(launch.job) for launch in launches) // _LINE) * _LINE
        space = np.zeros(len(launches) * pitch + _LINE, np.uint8)
        skipped = -space.ctypes.data % _LINE
        jobs = space[skipped : skipped + len(launches) * pitch].reshape(len(launches), pitch)
        for row, launch in zip(jobs, launches, strict=True):
            row[: len(launch.job)] = np.frombuffer(launch.job, np.uint8)
        self._headers = jobs[:, : 8 * HEADER_FIELDS].view(np.int64)
        self._items = np.array(
            [
                (launch.kernel, row.ctypes.data, launch.threads)
                for row, launch in zip(jobs, launches, strict=True)
            ],
            np.int64,
        )
        self._threads = max(launch.threads for launch in launches)
        values = {"items": self._items.ctypes.data, "count": len(launches), "give_way": give_way()}
        self._job = record(PROGRAM_JOB, values)
        self._current = self._job["current"]
        self._at = self._job.ctypes.data
        self._launch = program_launcher(True)

    def run(self) -> None:
        """Do everything again, in a team of as many threads as torch uses, but no more than any item did."""
        self._headers[:] = 0
        self._current[0] = 0
        self._launch(self._at, min(self._threads, torch.get_num_threads()), self)


_ROOM = 8
"""Launches that are gathered at most; a layer has three."""


class _Gathering(threading.local):
    """A thread's record for what it gathers."""

    def __init__(self) -> None:
        self.items = np.zeros((_ROOM, 3), np.int64)
        values = {"items": self.items.ctypes.data, "give_way": give_way()}
        self.job = record(PROGRAM_JOB, values)
        self.current, self.count, self.at = self.job["current"], self.job["count"], self.job.ctypes.data


_gathering = _Gathering()


@contextlib.contextmanager
def gathered() -> Iterator[Callable[[], None]]:
    """While open, launches of this thread wait, to run in one team; gives the function that runs them now.

    To be called before anything but a kernel reads what they write. While a step is recorded nothing waits.
    """
    if is_listened_to():
        yield lambda: None
        return
    queue: list[tuple[int, int, int, object]] = []

    def flush() -> None:
        with queueing(None):
            for first in range(0, len(queue), _ROOM):
                _run_together(queue[first : first + _ROOM])
        queue.clear()

    with queueing(queue):
        yield flush
    flush()


def _run_together(queue: Sequence[tuple[int, int, int, object]]) -> None:
    own = _gathering
    for i, (kernel, job, threads, _) in enumerate(queue):
        own.items[i] = kernel, job, threads
        ctypes.memset(job, 0, 8 * HEADER_FIELDS)
    own.current[0], own.count[0] = 0, len(queue)
    program_launcher(False)(own.at, max(threads for _, _, threads, _ in queue), own)
