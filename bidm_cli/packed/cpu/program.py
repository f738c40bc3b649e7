"""Launches of kernels, to be repeated in one go; see :mod:`bidm_cli.packed.cpu.program_kernel`.

program = Program(launches)      # as bidm_cli.packed.cpu.team.listening tells of them
program.run()                    # all of them again, with the jobs they had
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bidm_cli.packed.cpu.jobs import HEADER_FIELDS, PROGRAM_JOB, record
from bidm_cli.packed.cpu.kernels import program_launcher
from bidm_cli.packed.cpu.team import Launched, give_way

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
        self._launch = program_launcher()

    def run(self) -> None:
        """Do everything again, in a team of as many threads as torch uses, but no more than any item did."""
        self._headers[:] = 0
        self._current[0] = 0
        self._launch(self._at, min(self._threads, torch.get_num_threads()), self)
