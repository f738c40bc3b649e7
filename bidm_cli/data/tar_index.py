"""Index of a tar archive: names and places of its files, found in one pass; nothing is ever extracted.

    index = TarIndex.read(Path("train-0000.tar"), is_image)
    index.content("000001.jpg")     # bytes

A plain .tar is read in place from then on. A compressed one can only be read from its beginning, so what is
wanted of it is kept in main memory, up to :data:`UNPACKED_BYTES`. Indices of many files are kept in the
user's cache folder, by path, size and time of change.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from bidm_cli.data import image_files
from bidm_cli.data.npz import SUSPECT_BYTES, SUSPECT_RATIO, StoredEntry, reading
from bidm_cli.data.tar_headers import BLOCK, TarEntry, checksum, number, tar_entries
from bidm_cli.errors import BidmError
from bidm_cli.files import cache_folder, write_atomically

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
UNPACKED_BYTES = 1 << 30
"""Bytes of files that are kept of a compressed archive."""
TEXT_BYTES = 1 << 10
"""Largest .cls file that is read."""
CACHED_FILES = 10_000
"""Indices of archives with so many files are kept."""
_COMPRESSIONS: dict[bytes, tuple[str, Callable[..., Any] | None]] = {
    b"\x1f\x8b": ("gunzip", gzip.open),
    b"BZh": ("bunzip2", bz2.open),
    b"\xfd7zXZ\0": ("unxz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("unzstd", None),
}


@dataclass
class TarIndex:
    """Files of an archive by name.

    Attributes:
        left_out: number of entries that are no files, by kind. repeated: names that occur again; as in tar,
            the last entry of a name counts.
        texts: content of the small files ``*.cls``. contents: of a compressed archive, what is wanted of it.
        time: of the archive's last change, ns.
    """

    path: Path
    files: dict[str, TarEntry] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    contents: dict[str, bytes] | None = None
    time: int = 0

    @classmethod
    def read(cls, path: Path, wanted: Callable[[str], bool]) -> TarIndex:
        """Read all headers of an archive, and of a compressed one the content of ``wanted`` names.

        Raises:
            BidmError: no such file, it is no tar archive, is damaged, cut short, or unpacks to too much.
        """
        try:
            about, magic = path.stat(), compression(path)
        except OSError as error:
            raise BidmError(f"{path} cannot be opened: {error.strerror}") from error
        index = cls(path, time=about.st_mtime_ns)
        if magic is None:
            place = _cache_path(path, about)
            if not index._recall(place):
                with reading(str(path)), open(path, "rb") as handle:
                    index._fill(handle, about.st_size, wanted)
                index._remember(place)
            return index
        tool, opener = _COMPRESSIONS[magic]
        if opener is None:
            raise BidmError(
                f"{path} is compressed by zstd; unpack it first ({tool} {path.name}), or use .tar.gz"
            )
        index.contents = {}
        end = max(SUSPECT_BYTES, SUSPECT_RATIO * about.st_size)
        with reading(str(path)), opener(path) as handle:
            index._fill(handle, end, wanted, tool)
        return index

    def content(self, name: str) -> bytes:
        """Bytes of a file.

        Raises:
            BidmError: it claims over :data:`image_files.MAX_ENTRY_BYTES`, or the archive was changed.
        """
        where, entry = f"{name} in {self.path}", self.files[name]
        self.check_size(name)
        if self.contents is not None:
            return self.contents[name]
        with reading(where), open(self.path, "rb") as handle:
            handle.seek(entry.offset)
            content = handle.read(entry.size)
        if len(content) != entry.size:
            raise BidmError(f"{where} is cut short")
        return content

    def open(self, name: str) -> IO[bytes]:
        """Bytes of a file, to be read and closed; of a large one what is asked for.

        Raises:
            BidmError: as :meth:`content`.
        """
        entry = self.files[name]
        if self.contents is None and entry.size > image_files.STORED_WHOLE:
            self.check_size(name)
            return io.BufferedReader(StoredEntry(self.path, entry.offset, entry.size))
        return io.BytesIO(self.content(name))

    def check_size(self, name: str) -> None:
        """Raise BidmError if a file is larger than any image that is read."""
        size = self.files[name].size
        if size > image_files.MAX_ENTRY_BYTES:
            raise BidmError(f"{name} in {self.path} claims {size:,} bytes; no image is read beyond 256 MiB")

    def _recall(self, place: Path | None) -> bool:
        """Take the index from a cache file; False if there is none, or a damaged one."""
        if place is None or not place.is_file():
            return False
        try:
            with np.load(place, allow_pickle=False) as stored:
                about = json.loads(bytes(stored["about"]))
                places = stored["places"].tolist()
            names, self.texts, self.repeated = about["names"], about["texts"], about["repeated"]
            self.left_out = Counter(about["left_out"])
            pairs = zip(names, places, strict=True)
            self.files = {name: TarEntry(name, "", offset, size) for name, (offset, size) in pairs}
        except Exception:  # any damage at all: it is read again
            self.files, self.texts, self.repeated, self.left_out = {}, {}, 0, Counter()
        return bool(self.files)

    def _remember(self, place: Path | None) -> None:
        if place is None or len(self.files) < CACHED_FILES:
            return
        about: dict[str, Any] = {"names": list(self.files), "texts": self.texts}
        about |= {"repeated": self.repeated, "left_out": self.left_out}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        places = np.array([(one.offset, one.size) for one in self.files.values()], np.int64)
        with contextlib.suppress(BidmError), write_atomically(place) as temporary:
            np.savez_compressed(temporary, about=text, places=places)

    def _fill(self, handle: IO[bytes], end: int, wanted: Callable[[str], bool], tool: str = "") -> None:
        kept = 0
        for entry in tar_entries(handle, str(self.path), end, compressed=bool(tool)):
            if entry.kind:
                self.left_out[entry.kind] += 1
                continue
            self.repeated += entry.name in self.files
            self.files[entry.name] = entry
            if entry.name.endswith(".cls"):
                text = handle.read(entry.size) if entry.size <= TEXT_BYTES else b""
                self.texts[entry.name] = text.decode("utf-8", "replace").strip()
            elif self.contents is not None and wanted(entry.name):
                kept += entry.size
                self.check_size(entry.name)
                if kept > UNPACKED_BYTES:
                    raise BidmError(
                        f"{self.path} unpacks to over 1 GiB of images, and of a compressed archive all are "
                        "kept in memory; unpack it to a plain .tar, which is read in place "
                        f"({tool} {self.path.name})"
                    )
                self.contents[entry.name] = handle.read(entry.size)


def _cache_path(path: Path, about: os.stat_result) -> Path | None:
    try:
        key = f"{os.path.realpath(path)} {about.st_size} {about.st_mtime_ns}"
        name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]
        return cache_folder() / f"tar-{name}.npz"
    except RuntimeError:  # no home folder
        return None


def compression(path: Path) -> bytes | None:
    """First bytes that say how a file is compressed; None if they say nothing.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as handle:
        head = handle.read(8)
    return next((magic for magic in _COMPRESSIONS if head.startswith(magic)), None)


def is_tar(path: Path) -> bool:
    """True if a file is a tar archive by its first header, or by its name, and no zip of that name."""
    try:
        magic = compression(path)
        opener: Callable[..., Any] | None = open if magic is None else _COMPRESSIONS[magic][1]
        block = b""
        if opener is not None:
            with opener(path, "rb") as handle:
                block = handle.read(BLOCK)
        if len(block) == BLOCK and any(block) and number(block[148:156]) == checksum(block):
            return True
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        pass
    return path.name.lower().endswith(TAR_SUFFIXES) and not zipfile.is_zipfile(path)
