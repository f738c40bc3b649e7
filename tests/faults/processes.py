"""``bidm`` in processes of its own that can be killed, each forked from one that has imported everything.

run = Started(["compress", ...], folder)
run.kill_after(0.3)     # True if it was still running
run.kill_after(3, 1)    # the second of the processes that it started
run.end()               # exit status and what it printed
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from bidm_cli.interrupts import SIGNALS

LIMIT_SECONDS = 1800.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preloaded"])


class Started:
    """One ``bidm`` command under way in ``folder``; a state is written after every training step."""

    def __init__(self, words: Sequence[object], folder: Path) -> None:
        self.folder, self.log = folder, folder / f"{time.monotonic_ns()}.log"
        self.process = _context.Process(target=_bidm, args=([str(word) for word in words], folder, self.log))
        self.process.start()

    def kill_after(self, seconds: float, rank: int | None = None) -> bool:
        """SIGKILL after a while, to all or to one of the processes that were started; False if it had ended.

        Raises:
            AssertionError: the others do not end, or another one than ``rank`` is named.
        """
        self.process.join(seconds)
        if self.process.exitcode is not None:
            return False
        assert self.process.pid is not None
        children = _children(self.process.pid)
        if rank is None:
            for one in (self.process.pid, *children):
                _kill(one)
            _wait_for(children)
        elif rank < len(children):
            _kill(children[rank])
        status, printed = self.end()
        if rank is None or not status:
            return status == -signal.SIGKILL
        assert status == 1 and f"process {rank} of 2 was ended by SIGKILL" in printed, printed
        return True

    def when(self, condition: Callable[[], bool]) -> int:
        """Process id, once ``condition`` holds."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, self.printed()
            time.sleep(0.01)
        assert self.process.pid is not None
        return self.process.pid

    def end(self) -> tuple[int, str]:
        """Exit status and output, once it has ended."""
        self.process.join(LIMIT_SECONDS)
        assert self.process.exitcode is not None, f"still running: {self.printed()}"
        return self.process.exitcode, self.printed()

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def done(words: Sequence[object], folder: Path) -> str:
    """Output of a command that succeeds."""
    status, printed = Started(words, folder).end()
    assert status == 0, printed
    return printed


def usual_signals() -> None:
    """Handle signals as a program started in a terminal: the background of a script ignores SIGINT."""
    for one in SIGNALS:
        signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)


def _bidm(words: list[str], folder: Path, log: Path) -> None:
    from bidm_cli.parallel import launch

    usual_signals()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    kept = {"DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    launch.subprocess = types.SimpleNamespace(Popen=functools.partial(_Forked, words), **kept)
    _main(words)


class _Forked:
    """A process that ``--processes`` starts, forked from this one instead, which has imported everything."""

    def __init__(
        self, words: list[str], command: list[str], env: dict[str, str], **streams: int | None
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_placed, args=(words, env, streams))
        self.process.start()
        self.pid, self.terminate, self.kill = self.process.pid, self.process.terminate, self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0.0)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _placed(words: list[str], environment: dict[str, str], streams: dict[str, int | None]) -> None:
    os.environ.update(environment)
    if streams["stdout"] is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _main(words)


def _main(words: list[str]) -> None:
    from bidm_cli.cli.main import main
    from bidm_cli.distill import trainer

    trainer.CHECKPOINT_EVERY_SECONDS = 0.0
    sys.argv = ["bidm", *words]
    main()


def _children(process: int) -> list[int]:
    """Processes that a process has started, in their order."""
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _wait_for(processes: Sequence[int]) -> None:
    """Wait until killed processes, which are not this one's children, are gone."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(_is_alive(process) for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.01)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
