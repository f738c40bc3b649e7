"""Signals that end a long run, which then says what is kept and how to go on.

SIGINT is Ctrl-C; SIGTERM comes from schedulers and ``kill``, SIGHUP from a terminal that is closed, SIGUSR1
from schedulers that warn before they kill (SLURM, if asked to), SIGXCPU at a limit of processor
time. One that is ignored, as SIGHUP under nohup, stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A stop from outside: one line on what is kept and how to go on; empty where there is nothing to say.

    Arguments stand in backquotes, as in :class:`bidm_cli.errors.BidmError`.
    """

    def __init__(self, message: str = "", signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.message, self.signum = message, signum


@dataclass
class StopRequest:
    """A signal that came in a :func:`deferred_signals` block: its number, 0 while there was none."""

    signum: int = 0


@contextlib.contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Note the first signal instead of stopping at once; a second one does what it did before the block.

    Only the main thread gets signals: in another one nothing is noted.
    """
    request = StopRequest()
    before: dict[int, Any] = {}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        before.clear()

    def note(signum: int, frame: object) -> None:
        request.signum = signum
        restore()

    _install(note, before)
    try:
        yield request
    finally:
        restore()


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
    """Raise Interrupted at once on any signal that would end the process silently, in the block."""

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted(signum=signum)

    before: dict[int, Any] = {}
    _install(interrupt, before)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _install(handler: Callable[[int, object], None], before: dict[int, Any]) -> None:
    """Set a handler of all signals that are not ignored, and note those that were there."""
    if threading.current_thread() is not threading.main_thread():
        return
    for signum in SIGNALS:
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):
            before[signum] = signal.signal(signum, handler)


@contextlib.contextmanager
def explained(message: Callable[[], str]) -> Iterator[None]:
    """Give an interruption of the block its message, unless it has one."""
    try:
        yield
    except KeyboardInterrupt as error:
        if getattr(error, "message", ""):
            raise
        raise Interrupted(message(), getattr(error, "signum", signal.SIGINT)) from error
