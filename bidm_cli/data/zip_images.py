"""Images of a zip, read in place and never trusted."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from bidm_cli.data import image_files
from bidm_cli.data.image_files import FileImages, image_names, labels_of_files
from bidm_cli.data.npz import StoredEntry, data_offset, reading
from bidm_cli.errors import BidmError


class ZipImages(FileImages):
    """Images of a zip."""

    def __init__(self, path: Path, labels: str | Path | None, upright: bool) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._process, self._lock = -1, threading.Lock()
        files = [entry.filename for entry in self.archive.infolist() if not entry.is_dir()]
        images = image_names(files)
        super().__init__(path, images, labels_of_files(images, files, labels, self.content), upright)

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.names[index]
        return self._decoded(io.BytesIO(self.content(name)), f"{name} in {self.path}")

    def stamp(self, index: int) -> tuple[int, int]:
        entry = self.archive.getinfo(self.names[index])
        return entry.file_size, entry.CRC

    def open(self, index: int) -> IO[bytes]:
        entry = self.archive.getinfo(self.names[index])
        large = entry.file_size > image_files.STORED_WHOLE and entry.compress_type == zipfile.ZIP_STORED
        if large and not entry.flag_bits & 1:
            return io.BufferedReader(StoredEntry(self.path, data_offset(self.path, entry), entry.file_size))
        return io.BytesIO(self.content(entry.filename))

    def content(self, name: str) -> bytes:
        """Bytes of an entry, whose CRC is checked.

        Raises:
            BidmError: it is encrypted, damaged, or claims over :data:`image_files.MAX_ENTRY_BYTES`.
        """
        where = f"{name} in {self.path}"
        with reading(where):
            entry = self.archive.getinfo(name)
        if entry.flag_bits & 1:
            raise BidmError(f"{where} is encrypted; unpack the zip into a folder first")
        if entry.file_size > image_files.MAX_ENTRY_BYTES:
            raise BidmError(f"{where} claims {entry.file_size:,} bytes; no image is read beyond 256 MiB")
        # The claimed size bounds what is unpacked, whatever the compressed stream would expand to.
        with reading(where), self.archive.open(entry) as handle:
            return handle.read(entry.file_size)

    @property
    def archive(self) -> zipfile.ZipFile:
        """The archive, opened in this process."""
        # A forked data worker shares the parent's file position, so each process opens its own.
        with self._lock:
            if self._archive is None or self._process != os.getpid():
                self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
            return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
