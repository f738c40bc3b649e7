"""Lock on a folder that one process writes to; the system releases it when the process ends, however it does.

with folder_lock(Path("runs/x"), "choose another `run_dir`", print):
    write()
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from bidm_cli.errors import BidmError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
LOCK = ".lock"
"""File in the folder, there while it is written to. One that a killed process left locks nothing."""
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class FolderInUse(BidmError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def folder_lock(
    folder: Path, otherwise: str, say: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Hold the lock of ``folder`` in the block; make the folder, and remove it if it is empty after.

    Args:
        otherwise: the way out where the folder is in use: "choose another `run_dir`".
        say: called with a line where the file system has no locks.

    Raises:
        FolderInUse: another process holds it.
        BidmError: the folder cannot be made.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        file = _locked(folder, otherwise, say)
    except OSError as error:
        _remove_empty(made)
        if folder.is_dir() and error.errno in _READ_ONLY:
            # Nobody can write to it; what is complete there may still be looked at.
            yield
            return
        reason = error.strerror or error
        raise BidmError(f"cannot write to {folder}: {reason}; choose another folder") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        file.close()
        _remove_empty(made)


def _locked(folder: Path, otherwise: str, say: Callable[[str], None]) -> BinaryIO:
    """The lock's file, open and locked."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115  (held by the caller)
        try:
            lock(file, say)
            # The holder before may have removed the file between opening and locking.
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        except BlockingIOError as error:
            holder = _holder(file)
            file.close()
            raise FolderInUse(
                f"{folder} is being written to by {holder}; wait for it, or {otherwise}"
            ) from error
        except FileNotFoundError:
            file.close()
        except OSError:
            file.close()
            raise


def lock(file: BinaryIO, say: Callable[[str], None]) -> None:
    """Lock an open file until it is closed; ``say`` is called where the file system has no locks.

    Raises:
        BlockingIOError: another process has it locked.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        say(f"{Path(file.name).parent} cannot be locked ({error.strerror}): let no other run write to it")


def _holder(file: BinaryIO) -> str:
    with contextlib.suppress(OSError):
        file.seek(0)
        if text := file.read(200).decode("utf-8", "replace").strip():
            return text
    return "another process"


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
