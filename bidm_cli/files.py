"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bidm_cli.errors import BidmError
from bidm_cli.locks import CAN_LOCK, lock

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}(\.\w+)?")


@contextlib.contextmanager
def write_atomically(path: Path, clears: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; sync and rename it on success, remove it on any failure.

    Args:
        clears: first remove what killed processes left of the same file (:func:`remove_leftovers`); False for
            one of many files of a folder, which takes a listing each.

    Raises:
        BidmError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if clears:
            remove_leftovers(path.parent, path)
        with _temporary(path) as temporary:
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its archive writer.
        # RuntimeErrors have no reason, nor have the OSErrors of numpy.
        read_only = not os.access(path.parent, os.W_OK)
        likely = "the folder is read-only" if read_only else "the disk may be full"
        way_out = "choose another folder" if read_only else "free some space or choose another folder"
        raise BidmError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or likely}; {way_out}"
        ) from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """New file beside ``path``, locked in the block, so that no process takes it for a leftover."""
    # The suffix is kept: numpy and Pillow choose the format (or append one) by it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    with contextlib.ExitStack() as held:
        held.callback(_unlink, temporary)
        if CAN_LOCK:
            file = held.enter_context(open(temporary, "xb"))
            # Another process may have cleared it between opening and locking.
            if not (_is_free(file, unknown=True) and temporary.exists()):
                temporary = held.enter_context(_temporary(path))
        yield temporary


def remove_leftovers(folder: Path, target: Path | None = None) -> None:
    """Remove temporary files of :func:`write_atomically` that killed processes left in ``folder``.

    One that a living process writes stays; where the file system has no locks to tell, those of a ``target``.

    Args:
        target: remove those of this file alone. Without it, no other process may write to ``folder``.
    """
    pattern = _TEMPORARY
    if target is not None:
        pattern = re.compile(rf"\.{re.escape(target.stem)}\.[0-9a-f]{{8}}{re.escape(target.suffix)}")
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if pattern.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                _remove_unless_written(path, sure=target is None)


def _remove_unless_written(path: Path, sure: bool) -> None:
    """Remove a temporary file unless a process has it locked; if locks do not tell, only if ``sure``."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as held:
        if CAN_LOCK:
            sure = _is_free(held.enter_context(open(path, "r+b")), unknown=sure)
        if sure:
            path.unlink()


def _is_free(file: BinaryIO, unknown: bool) -> bool:
    """Lock a file; False if another process has, ``unknown`` where the file system has no locks."""
    lines: list[str] = []
    try:
        lock(file, lines.append)
    except BlockingIOError:
        return False
    return unknown if lines else True


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise BidmError if the folder that ``path`` will be written to, or made in, is read-only."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK):
        raise BidmError(f"cannot write {path}: the folder {folder} is read-only; choose another folder")


def is_taken(path: Path) -> bool:
    """Return True if writing to ``path`` would replace something: a file or folder that is not empty."""
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def cache_folder() -> Path:
    """Folder of what bidm remembers between calls: ``bidm`` in XDG_CACHE_HOME, ``~/.cache`` or AppData/Local.

    Raises:
        RuntimeError: there is no home folder.
    """
    default = Path.home() / ("AppData/Local" if os.name == "nt" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "bidm"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
