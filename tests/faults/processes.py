"""``bidm`` in processes of its own that can be killed, each forked from one that has imported everything.

run = Started(["compress", ...], folder)
run.kill_after(0.3)     # True if it was still running
run.end()               # exit status and what it printed
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
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

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL after a while; False if it had ended by then."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -9

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
    from bidm_cli.cli.main import main
    from bidm_cli.distill import trainer

    usual_signals()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    trainer.CHECKPOINT_EVERY_SECONDS = 0.0
    sys.argv = ["bidm", *words]
    main()
