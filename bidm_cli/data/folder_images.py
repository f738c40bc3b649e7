"""Images of a folder, searched recursively."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

import numpy as np

from bidm_cli.data.image_files import MAX_ENTRY_BYTES, FileImages, image_names, labels_of_files
from bidm_cli.data.tar_images import archives_among
from bidm_cli.errors import BidmError


class FolderImages(FileImages):
    """Images among the ``files`` [relative POSIX paths] of a folder."""

    def __init__(self, path: Path, files: list[str], labels: str | Path | None, upright: bool) -> None:
        images, archives = image_names(files), len(archives_among(files))
        labelling = labels_of_files(images, files, labels, lambda name: _bounded(path / name))
        notes = (f"{archives:,} tar archives beside the images are not read",) if archives else ()
        super().__init__(path, images, labelling, upright, notes)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.path / self.names[index]
        try:
            with open(path, "rb") as handle:
                return self._decoded(handle, str(path))
        except OSError as error:
            raise BidmError(f"{path} cannot be opened: {error.strerror}") from error

    def stamp(self, index: int) -> tuple[int, int]:
        found = os.stat(os.path.join(self.path, self.names[index]))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        return found.st_size, found.st_mtime_ns

    def open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self.path, self.names[index]), "rb")


def _bounded(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_ENTRY_BYTES:
            raise BidmError(f"{path} is larger than 256 MiB")
        return path.read_bytes()
    except OSError as error:
        raise BidmError(f"{path} cannot be read: {error.strerror}") from error


def walk(root: Path) -> list[str]:
    """Relative POSIX paths of all files below ``root``; links to folders are followed once."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name).relative_to(root).as_posix() for name in files]
    return found
