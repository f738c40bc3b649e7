"""Threads for the kernels: the OpenMP team that torch itself runs on, so that there is one pool.

Two pools on the same cores fight: an idle OpenMP thread spins for a while before it sleeps, and holds the
core that the other pool's thread needs. Here kernels are started through the OpenMP runtime that torch is
linked to, with torch's thread count; where that cannot be reached, plain Python threads are used (kernels
run without the interpreter lock).

Launches can be listened to (:func:`listening`), so that a program can repeat them without Python between.

A team ends when its last thread has come and gone. On a busy machine that thread may be waiting for a core
long after the others have done all the work, so teams keep an eye on it (:class:`TeamHeuristic`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

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
    """How every job record begins: the next item, and how many threads found work, took a workspace, came
    and returned.
    """

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("counter", "workers", "arrivals", "entered", "returned")
    )


class TeamHeuristic:
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


_COMPANY = TeamHeuristic()


class Launched(NamedTuple):
    """A launch, for who listens.

    Attributes:
        kernel: its address. job: a copy of the record. threads: how many it may run in at most.
        owner: of the memory that the job points to, but for tensors.
    """

    kernel: int
    job: bytes
    threads: int
    owner: object


class _Hooks(threading.local):
    """Who wants to know of this thread's launches, and who takes them in hand."""

    listener: Callable[[Launched], None] | None = None
    queue: list[tuple[int, int, int, object]] | None = None


_hooks = _Hooks()


@contextlib.contextmanager
def listening(listener: Callable[[Launched], None]) -> Iterator[None]:
    """While open, ``listener`` is told of every launch of this thread, after it."""
    before, _hooks.listener = _hooks.listener, listener
    try:
        yield
    finally:
        _hooks.listener = before


def is_listened_to() -> bool:
    """Whether somebody listens to this thread's launches."""
    return _hooks.listener is not None


@contextlib.contextmanager
def queueing(queue: list[tuple[int, int, int, object]] | None) -> Iterator[None]:
    """While open, launches do not run, but go to ``queue``: (kernel, job address, threads, owner). With None
    they do run, inside another one.
    """
    before, _hooks.queue = _hooks.queue, queue
    try:
        yield
    finally:
        _hooks.queue = before


Launch = Callable[[int, int, object], None]
"""(job address, threads, owner): run a kernel, see :func:`launcher`."""


def launcher(address: int, size: int, long: bool = False) -> Launch:
    """A function (job address, threads, owner) that runs the kernel at ``address`` in a team and waits for
    it.

    Every thread calls the kernel with the same job, a record of ``size`` bytes; kernels share the work
    through the job's counter. ``owner`` is whatever keeps alive the job and the memory that it points to,
    besides the tensors that go in and out. ``long``: jobs take long against the start of a team, which is
    tried every time, whether or not the last ones were of help.
    """
    run = _team(address, None if long else _COMPANY)

    def launch(job: int, threads: int, owner: object) -> None:
        if _hooks.queue is not None:
            _hooks.queue.append((address, job, threads, owner))
            return
        run(job, threads)
        if _hooks.listener is not None:
            _hooks.listener(Launched(address, ctypes.string_at(job, size), threads, owner))

    return launch


def _team(address: int, company: TeamHeuristic | None) -> Callable[[int, int], None]:
    """A function (job address, threads) that runs the kernel at ``address`` in a team and waits for it."""
    kernel, start = _KERNEL(address), openmp()

    def alone(job: int) -> None:
        header = Header.from_address(job)
        header.counter = header.arrivals = 0
        kernel(job)

    def in_openmp_team(job: int, threads: int) -> None:
        if threads == 1 or (company and not company.wanted()):
            alone(job)
            return
        header = Header.from_address(job)
        header.counter = header.workers = header.arrivals = 0
        start(address, job, threads, 0)
        if company:
            company.told(header.workers)

    def in_python_threads(job: int, threads: int) -> None:
        if threads == 1:
            alone(job)
            return
        header = Header.from_address(job)
        header.counter = header.arrivals = 0
        wait([_pool(threads).submit(kernel, job) for _ in range(threads)])

    return in_python_threads if start is None else in_openmp_team


@functools.cache
def give_way() -> int:
    """The address of a C function that sleeps for some microseconds (usleep); 0 without one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


def threads_for(work: int, grain: int) -> int:
    """How many threads to use: torch's count, but no more than there are grains of work.

    Starting a team and waiting for it takes a few microseconds, far more when the machine is busy.
    """
    return max(1, min(torch.get_num_threads(), work // grain))


def description() -> str:
    """For ``bidm doctor``."""
    kind = "torch's OpenMP team" if openmp() is not None else "Python threads"
    return f"{torch.get_num_threads()} threads, {kind}"
