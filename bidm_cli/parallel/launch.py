"""Several processes of one command on this machine: started, watched, and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from bidm_cli.errors import BidmError
from bidm_cli.parallel.place import LAUNCHED, LOST

EVERY = 0.1
"""Seconds between looks at the processes."""
OWN_END, TERMINATED = 10.0, 30.0
"""Seconds that the others have to end by themselves once one has failed, and then to end when asked to."""

Copies = list["subprocess.Popen[bytes]"]


def launch(
    count: int,
    command: Sequence[str],
    way_out: str,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Run ``command`` in ``count`` processes that join each other; exit status of the whole.

    The first one has standard input and output; of the others, what they write to standard error is seen.

    Args:
        way_out: what to do after one of them was killed, such as "continue with `resume`".

    Raises:
        BidmError: a process was killed; the others have been ended.
    """
    shared = {
        **environment, LAUNCHED: "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
    }  # fmt: skip
    copies: Copies = []
    for rank in range(count):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        silent = subprocess.DEVNULL if rank else None
        copies.append(subprocess.Popen(command, env=own, stdin=silent, stdout=silent))
    with _passed_on(copies) as stopped:
        try:
            _watch(copies)
            return _status(copies, way_out, bool(stopped))
        except KeyboardInterrupt:  # the terminal has sent it to all of them
            _end(copies, asked=True)
            return 130
        finally:
            _end(copies)


def this_command() -> list[str]:
    """The command that this process runs, as :func:`launch` takes it."""
    return [sys.executable, "-m", "bidm_cli", *sys.argv[1:]]


def _watch(copies: Copies) -> None:
    """Wait until all processes have ended, or one has failed and the others had their time to notice."""
    deadline = float("inf")
    while any(copy.poll() is None for copy in copies) and time.monotonic() < deadline:
        if any(copy.returncode for copy in copies):
            deadline = min(deadline, time.monotonic() + OWN_END)
        time.sleep(EVERY)


def _status(copies: Copies, way_out: str, stopped: bool) -> int:
    """Exit status of the whole: that of the process that failed, not of those that noticed.

    Raises:
        BidmError: a process was killed, or all lost each other.
    """
    codes = {rank: copy.returncode for rank, copy in enumerate(copies) if copy.returncode}
    for rank, code in codes.items():
        if code < 0 and not stopped:
            hint = ": often too little main memory" if code == -signal.SIGKILL else ""
            raise BidmError(
                f"process {rank} of {len(copies)} was ended by {signal.Signals(-code).name}{hint}; the "
                f"others were ended, too; {way_out}"
            )
    own = [code for code in codes.values() if code != LOST]
    if codes and not own:
        raise BidmError(f"the {len(copies)} processes lost each other; {way_out}")
    return abs(own[0]) if own else 0


def _end(copies: Copies, asked: bool = False) -> None:
    """End all that still run: by SIGTERM, unless they were ``asked`` already; by SIGKILL after a while."""
    running = [copy for copy in copies if copy.poll() is None]
    for copy in () if asked else running:
        copy.terminate()
    deadline = time.monotonic() + TERMINATED
    for copy in running:
        try:
            copy.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            copy.kill()
            copy.wait()


@contextlib.contextmanager
def _passed_on(copies: Copies) -> Iterator[list[int]]:
    """While open, SIGTERM goes to all processes; the list then holds it."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for copy in copies:
            if copy.poll() is None:
                copy.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
