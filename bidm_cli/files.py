"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from bidm_cli.errors import BidmError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.\w+")


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; sync and rename it on success, remove it on any failure.

    Raises:
        BidmError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    # The suffix is kept: numpy and Pillow choose the format (or append one) by it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of :func:`write_atomically` that a killed process left in ``folder``.

    For folders to which no other process writes.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
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
