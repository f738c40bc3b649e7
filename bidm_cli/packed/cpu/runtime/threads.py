"""Kernel launches in the OpenMP team that torch itself runs on, so that there is one thread pool.

Two pools on the same cores fight: an idle OpenMP thread spins for a while before it sleeps, and holds the
core that the other pool's thread needs. Here kernels are started through the OpenMP runtime that torch is
linked to, with torch's thread count; where that cannot be reached, plain Python threads are used (kernels
run without the interpreter lock).

A hook can capture launches (:func:`capturing`), so that a kernel sequence can replay them without Python.

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

from bidm_cli.packed.cpu.runtime.args import HEADER

ELEMENTS = 1 << 14
"""Activations that are worth a thread of their own."""

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
    """First fields of every argument struct."""

    _fields_ = tuple((name, ctypes.c_int64) for name in HEADER)


class TeamHeuristic:
    """Heuristic: run single-threaded while the OpenMP team does not help.

    After a few launches in a row that the calling thread did alone although a team had been started, the next
    ones start no team; after those it is tried again.
    """

    PATIENCE, FIRST_REST, LONGEST_REST = 3, 16, 512

    def __init__(self) -> None:
        self._alone, self._rest, self._length = 0, 0, self.FIRST_REST

    def wants_team(self) -> bool:
        """True if the next launch should start an OpenMP team."""
        if self._rest:
            self._rest -= 1
            return False
        return True

    def update(self, workers: int) -> None:
        """Take in how many threads of a team found work."""
        if workers > 1:
            self._alone, self._length = 0, self.FIRST_REST
            return
        self._alone += 1
        if self._alone >= self.PATIENCE:
            self._alone, self._rest = self.PATIENCE - 1, self._length
            self._length = min(2 * self._length, self.LONGEST_REST)


_HEURISTIC = TeamHeuristic()


class Launched(NamedTuple):
    """Record of one kernel launch, for capture hooks.

    Attributes:
        kernel: its address. args: a copy of the argument struct. threads: how many it may run in at most.
        owner: of the memory that the arguments point to, but for tensors.
    """

    kernel: int
    args: bytes
    threads: int
    owner: object


Queued = tuple[int, int, int, object]
"""A launch that waits: (kernel address, argument address, threads, owner)."""


class _Hooks(threading.local):
    """Hooks into the launches of one thread."""

    capture: Callable[[Launched], None] | None = None
    queue: list[Queued] | None = None


HOOKS = _Hooks()


@contextlib.contextmanager
def capturing(hook: Callable[[Launched], None]) -> Iterator[None]:
    """Call ``hook`` after every launch of this thread while open."""
    before, HOOKS.capture = HOOKS.capture, hook
    try:
        yield
    finally:
        HOOKS.capture = before


@contextlib.contextmanager
def not_capturing() -> Iterator[None]:
    """Leave what happens while open out of a capture under way: its operations, launches and memory."""
    before, HOOKS.capture = HOOKS.capture, None
    try:
        yield
    finally:
        HOOKS.capture = before


def is_capturing() -> bool:
    """Return True if a capture hook is set in this thread."""
    return HOOKS.capture is not None


Launch = Callable[[int, int, object], None]
"""Function (argument address, most threads, owner) that runs a kernel, see :func:`launcher`."""


def launcher(address: int, size: int, always_in_team: bool = False) -> Launch:
    """Make the function that runs the kernel at ``address`` in an OpenMP team and waits for it.

    Every thread calls the kernel with the same arguments, a struct of ``size`` bytes; kernels share the work
    through its counter. It has as many threads as torch uses, but at most those the call asks for.
    ``owner`` keeps alive the arguments and the memory that they point to, besides the tensors that go in and
    out. ``always_in_team``: launches take long against the start of the threads, which is tried
    every time, whether or not the last ones were of help.
    """
    run = _runner(address, None if always_in_team else _HEURISTIC)

    def launch(args: int, most_threads: int, owner: object) -> None:
        threads = min(most_threads, torch.get_num_threads())
        if HOOKS.queue is not None:
            HOOKS.queue.append((address, args, threads, owner))
            return
        run(args, threads)
        if HOOKS.capture is not None:
            HOOKS.capture(Launched(address, ctypes.string_at(args, size), threads, owner))

    return launch


def _runner(address: int, heuristic: TeamHeuristic | None) -> Callable[[int, int], None]:
    """A function (argument address, threads) that runs the kernel at ``address`` in a team."""
    kernel, start = _KERNEL(address), openmp()

    def in_openmp_team(args: int, threads: int) -> None:
        header = Header.from_address(args)
        header.counter = header.workers = header.arrivals = 0
        if threads == 1 or (heuristic and not heuristic.wants_team()):
            kernel(args)
            return
        start(address, args, threads, 0)
        if heuristic:
            heuristic.update(header.workers)

    def in_python_threads(args: int, threads: int) -> None:
        header = Header.from_address(args)
        header.counter = header.workers = header.arrivals = 0
        if threads == 1:
            kernel(args)
        else:
            wait([_pool(threads).submit(kernel, args) for _ in range(threads)])

    return in_python_threads if start is None else in_openmp_team


@functools.cache
def give_way() -> int:
    """Return the address of a C function that sleeps for some microseconds (usleep); 0 without one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


def most_threads(work: int, grain: int) -> int:
    """Threads that are worth starting for so much work: one per grain, at least one.

    Starting them and waiting for them takes a few microseconds, far more when the machine is busy.
    """
    return max(1, work // grain)


def description() -> str:
    """Return thread count and kind of team, for ``bidm doctor``."""
    kind = "torch's OpenMP team" if openmp() is not None else "Python threads"
    return f"{torch.get_num_threads()} threads, {kind}"
