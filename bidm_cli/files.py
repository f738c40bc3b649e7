"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from bidm_cli.errors import BidmError


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
        reason = error.strerror if isinstance(error, OSError) else None
        raise BidmError(
            f"cannot write {path}: {reason or 'the disk may be full'}; free some space or choose another "
            "folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
