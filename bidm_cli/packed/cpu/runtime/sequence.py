"""Kernel launches that share one OpenMP team; see :mod:`bidm_cli.packed.cpu.runtime.sequence_kernel`.

sequence = KernelSequence(launches)   # as captured by bidm_cli.packed.cpu.runtime.threads.capturing
sequence.run()                        # replay all of them, with the arguments they had

with LaunchQueue() as queue:          # launches in here wait
    ...
    queue.flush()                     # and run, as they do at the end
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from bidm_cli.packed.cpu.runtime.args import HEADER, SEQUENCE_ARGS, record
from bidm_cli.packed.cpu.runtime.compile import Kernel
from bidm_cli.packed.cpu.runtime.kernels import launcher_of
from bidm_cli.packed.cpu.runtime.threads import HOOKS, Launched, Queued, give_way
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES

SEQUENCE = Kernel("bidm_cli.packed.cpu.runtime.sequence_kernel:make_sequence", (), SEQUENCE_ARGS.itemsize)

_LINE = 64
"""Argument structs begin at a cache line of their own: all threads write to their headers."""

_HEADER_BYTES = 8 * len(HEADER)


class KernelSequence:
    """Captured launches, replayed in order in one OpenMP team without Python between them.

    Args:
        launches: what to run. What their arguments point to has to live as long as the sequence.
    """

    def __init__(self, launches: Sequence[Launched]) -> None:
        pitch = -(-max(len(launch.args) for launch in launches) // _LINE) * _LINE
        space = np.zeros(len(launches) * pitch + _LINE, np.uint8)
        skipped = -space.ctypes.data % _LINE
        structs = space[skipped : skipped + len(launches) * pitch].reshape(len(launches), pitch)
        items = []
        for struct, launch in zip(structs, launches, strict=True):
            struct[: len(launch.args)] = np.frombuffer(launch.args, np.uint8)
            items.append((launch.kernel, struct.ctypes.data, launch.threads))
        self._headers = structs[:, :_HEADER_BYTES].view(np.int64)
        self._items = np.array(items, np.int64)
        self._threads = max(launch.threads for launch in launches)
        self._args = _sequence_args(self._items, len(launches))
        self._current, self._address = self._args["current"], self._args.ctypes.data
        self._launch = launcher_of(SEQUENCE, True)

    def run(self) -> None:
        """Replay everything in a team of as many threads as torch uses, but no more than any launch had."""
        self._headers[:] = 0
        self._current[0] = 0
        self._launch(self._address, self._threads, self)


class _QueueArgs:
    """Arguments for the queued launches of one thread, at most ``ROOM`` at a time (a layer has three)."""

    ROOM = 8

    def __init__(self) -> None:
        self.items = np.zeros((self.ROOM, 3), np.int64)
        self.args = _sequence_args(self.items, 0)
        self.address, self.call = self.args.ctypes.data, self.args[["current", "count"]]

    def run(self, queue: Sequence[Queued]) -> None:
        most = 1
        for i, (kernel, args, threads, _) in enumerate(queue):
            self.items[i] = kernel, args, threads
            ctypes.memset(args, 0, _HEADER_BYTES)
            most = max(most, threads)
        self.call[0] = 0, len(queue)
        launcher_of(SEQUENCE)(self.address, most, self)


class LaunchQueue:
    """Context in which launches of this thread wait, to run in one team.

    :meth:`flush` is to be called before anything but a kernel reads what they write. While launches are
    captured nothing waits.
    """

    def __enter__(self) -> LaunchQueue:
        self._before = HOOKS.queue
        self._queue: list[Queued] = []
        if HOOKS.capture is None:
            HOOKS.queue = self._queue
        return self

    def flush(self) -> None:
        """Run the launches that wait."""
        queue, HOOKS.queue = HOOKS.queue, None
        try:
            for first in range(0, len(self._queue), _QueueArgs.ROOM):
                WORKSPACES.get(_QueueArgs, _QueueArgs).run(self._queue[first : first + _QueueArgs.ROOM])
        finally:
            HOOKS.queue = queue
        self._queue.clear()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        HOOKS.queue = self._before
        if error is None:
            self.flush()


def _sequence_args(items: np.ndarray, count: int) -> np.ndarray:
    values = {"current": 0, "items": items.ctypes.data, "count": count, "give_way": give_way()}
    return record(SEQUENCE_ARGS, values)
