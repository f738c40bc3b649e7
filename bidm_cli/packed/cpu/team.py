"""Threads for the kernels: the OpenMP team that torch itself runs on, so that there is one pool.

Two pools on the same cores fight: an idle OpenMP thread spins for a while before it sleeps, and holds the
core that the other pool's thread needs. Here kernels are started through the OpenMP runtime that torch is
linked to, with torch's thread count; where that cannot be reached, plain Python threads are used (kernels
run without the interpreter lock).

A team ends when its last thread has come and gone. On a busy machine that thread may be waiting for a core
long after the others have done all the work, so teams keep an eye on it (:class:`Company`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def openmp() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of torch's OpenMP runtime; None if it has none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            try:
                found = ctypes.CDLL(str(folder / name)).GOMP_parallel
            except (OSError, AttributeError):
                continue
            found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            found.restype = None
            return found
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bidm")


class Header(ctypes.Structure):
    """How every job record begins: the next item, and how many threads found work."""

    _fields_ = (("counter", ctypes.c_int64), ("workers", ctypes.c_int64))


class Company:
    """Whether other threads still help, or only keep the caller waiting.

    After a few jobs in a row that the calling thread did alone although a team had been started, the next
    jobs are not shared; after those it is tried again.
    """

    PATIENCE, FIRST_REST, LONGEST_REST = 3, 16, 512

    def __init__(self) -> None:
        self._alone, self._rest, self._length = 0, 0, self.FIRST_REST

    def wanted(self) -> bool:
        """Whether to start a team for the next job."""
        if self._rest:
            self._rest -= 1
            return False
        return True

    def told(self, workers: int) -> None:
        """After a team's job: how many of its threads found work."""
        if workers > 1:
            self._alone, self._length = 0, self.FIRST_REST
            return
        self._alone += 1
        if self._alone >= self.PATIENCE:
            self._alone, self._rest = self.PATIENCE - 1, self._length
            self._length = min(2 * self._length, self.LONGEST_REST)


_COMPANY = Company()


def launcher(address: int) -> Callable[[int, int], None]:
    """A function (job address, threads) that runs the kernel at ``address`` in a team and waits for it.

    Every thread calls the kernel with the same job; kernels share the work through the job's counter.
    """
    kernel, start = _KERNEL(address), openmp()

    def alone(job: int) -> None:
        Header.from_address(job).counter = 0
        kernel(job)

    def in_openmp_team(job: int, threads: int) -> None:
        if threads == 1 or not _COMPANY.wanted():
            alone(job)
            return
        header = Header.from_address(job)
        header.counter = header.workers = 0
        start(address, job, threads, 0)
        _COMPANY.told(header.workers)

    def in_python_threads(job: int, threads: int) -> None:
        if threads == 1:
            alone(job)
            return
        Header.from_address(job).counter = 0
        wait([_pool(threads).submit(kernel, job) for _ in range(threads)])

    return in_python_threads if start is None else in_openmp_team


def threads_for(work: int, grain: int) -> int:
    """How many threads to use: torch's count, but no more than there are grains of work.

    Starting a team and waiting for it takes a few microseconds, far more when the machine is busy.
    """
    return max(1, min(torch.get_num_threads(), work // grain))


def description() -> str:
    """For ``bidm doctor``."""
    kind = "torch's OpenMP team" if openmp() is not None else "Python threads"
    return f"{torch.get_num_threads()} threads, {kind}"
