"""Entries of zip archives: arrays of an ``.npz``, mapped where they are not compressed; never trusted."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from bidm_cli.errors import BidmError

SUSPECT_BYTES, SUSPECT_RATIO = 1 << 26, 200
"""What unpacks to more than both of them allow, times its size on disk, is taken for a bomb."""


def npz_keys(path: Path) -> list[str]:
    """Names of the arrays in an ``.npz``.

    Raises:
        BidmError: it is no archive, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise BidmError(f"{path} is not a .npz file, or damaged: {error}") from error


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever reading an archive raises into a BidmError that names ``where``."""
    try:
        yield
    except BidmError:
        raise
    except Exception as error:  # what zip, its compressions and numpy's header raise cannot be listed
        raise BidmError(f"{where} is damaged or cannot be read: {error}") from error


def load_npz_array(path: Path, key: str) -> np.ndarray:
    """One array of an ``.npz``, mapped from the file where it is stored uncompressed.

    Pickled objects are refused, and so is an array that would unpack to over 200 times its size on disk.

    Raises:
        BidmError: as above, or the array is damaged.
    """
    where = f"{path} [{key}]"
    with reading(where), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        if entry.file_size > max(SUSPECT_BYTES, SUSPECT_RATIO * entry.compress_size):
            raise BidmError(f"{where} would unpack {entry.compress_size:,} bytes to {entry.file_size:,}")
        with archive.open(entry) as handle:
            shape, fortran, dtype = _npy_header(handle, where)
            start = handle.tell()
            size = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
            if size != entry.file_size - start:
                raise BidmError(f"{where} is damaged: {shape} {dtype} does not fit its length")
            order: Any = "F" if fortran else "C"
            if entry.compress_type == zipfile.ZIP_STORED and size:
                offset = data_offset(path, entry) + start
                return np.memmap(path, dtype, "r", offset, shape, order)
            return np.frombuffer(handle.read(size), dtype).reshape(shape, order=order)


def npz_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of an array of an ``.npz``, without reading it.

    Raises:
        BidmError: it is damaged or holds pickled objects.
    """
    where = f"{path} [{key}]"
    with reading(where), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as handle:
        shape, _, dtype = _npy_header(handle, where)
        return shape, dtype


def _npy_header(handle: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy_format.read_magic(handle)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran, dtype = read(handle)
    if dtype.hasobject:
        raise BidmError(f"{where} holds pickled objects, which are never loaded")
    return shape, fortran, dtype


def data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Place in bytes of an entry's content within its archive."""
    # The local header repeats name and extra field, the latter with a length of its own.
    with open(path, "rb") as handle:
        handle.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", handle.read(4))
    return entry.header_offset + 30 + name + extra


class StoredEntry(io.RawIOBase):
    """Bytes ``start`` to ``start + size`` of a file, read in place: an entry that is not compressed."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._start, self._size, self._at = start, size, 0
        self._file = open(path, "rb")  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, self._size)[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        found = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()
