"""One look at every file of an image set before it is used: header, end, size, orientation.

    check = check_images(images, reporter)
    check.bad           # [("a/033.jpg", "is not a readable image: image file is truncated"), ...]
    images = images.keep(check.kept)

Headers are read for all; a file is decoded only where its end is not as it should be, and all are where the
set is small. About 0.1 to 0.2 ms per file, so that a million take some three minutes, once: facts are kept
by name, size and time of change (of a zip's entry: CRC) in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from bidm_cli.data.decode import orientation, refusal
from bidm_cli.data.image_files import FileImages
from bidm_cli.errors import BidmError, first_line
from bidm_cli.files import cache_folder, write_atomically
from bidm_cli.progress import Reporter

EDGE = 4096
"""Bytes at both ends of a file that are looked at."""
DECODED_BYTES, DECODED_IMAGES = 1 << 25, 10_000
"""Sets up to this size and number are decoded whole."""
CACHED_IMAGES = 1000
"""Facts of sets from this size on are kept."""
_COMPRESSED = frozenset({".jpeg", ".jpg", ".png", ".webp"})
_CHUNK = 200
T = TypeVar("T")


@dataclass(frozen=True)
class FileFacts:
    """Facts of one file.

    Attributes:
        size: bytes. stamp: time of change in ns, or CRC. width, height: pixels, upright.
        turned: it has an orientation other than upright. digest: CRC-32 of both ends.
        problem: why it cannot be used; empty if it can.
    """

    size: int = 0
    stamp: int = 0
    width: int = 0
    height: int = 0
    turned: bool = False
    digest: int = 0
    problem: str = ""


@dataclass(frozen=True)
class ImageCheck:
    """Facts of all files of a set, in the order of ``names``."""

    names: Sequence[str]
    facts: list[FileFacts]

    @cached_property
    def kept(self) -> np.ndarray:
        """Indices int64 [M] of the files that can be used."""
        return np.array([i for i, one in enumerate(self.facts) if not one.problem], dtype=np.int64)

    @cached_property
    def bad(self) -> list[tuple[str, str]]:
        """(name, problem) of the others."""
        return [(name, one.problem) for name, one in zip(self.names, self.facts, strict=True) if one.problem]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the files that can be used."""
        return [(one.width, one.height) for one in self.facts if not one.problem]

    @property
    def turned(self) -> int:
        """Number of usable files with an orientation other than upright."""
        return sum(one.turned for one in self.facts if not one.problem)

    def digest(self) -> str:
        """SHA-256 over name, size and ends of the files that can be used, wherever they lie."""
        digest = hashlib.sha256()
        for name, one in zip(self.names, self.facts, strict=True):
            if not one.problem:
                digest.update(f"{name}\0{one.size}\0{one.digest:08x}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def content_digest(self) -> str:
        """:meth:`digest`, and the times of change (or CRCs) of files without compression.

        Of those, size and ends do not tell the middle. Copies of them may differ though they are the same.
        """
        digest = hashlib.sha256(self.digest().encode())
        for name, one in zip(self.names, self.facts, strict=True):
            plain = os.path.splitext(name)[1].lower() not in _COMPRESSED and one.size > 2 * EDGE
            if plain and not one.problem:
                digest.update(f"{name}\0{one.stamp}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def check_images(images: FileImages, reporter: Reporter = Reporter()) -> ImageCheck:
    """Look at every file of a set; what was found at an earlier call is not read again."""
    count = len(images)
    path = _cache_path(images.path) if count >= CACHED_IMAGES else None
    known = _remembered(path)
    with _pool() as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF data and of large images
        facts = list(run(partial(_stamped, images), range(count)))
        for i, (name, one) in enumerate(zip(images.names, facts, strict=True)):
            earlier = known.get(name)
            if earlier is not None and (earlier.size, earlier.stamp) == (one.size, one.stamp):
                facts[i] = earlier
        new = [i for i, one in enumerate(facts) if not one.width and not one.problem]
        whole = count <= DECODED_IMAGES and sum(one.size for one in facts) <= DECODED_BYTES
        if new:
            reporter.stage("look at the images", len(new))
        for i, one in zip(new, run(lambda i: _looked_at(images, i, facts[i], whole), new), strict=True):
            facts[i] = one
            reporter.advance(None)
    if new and path is not None:
        _remember(path, images.names, facts)
    return ImageCheck(images.names, facts)


@contextlib.contextmanager
def _pool() -> Iterator[Callable[[Callable[[int], T], Sequence[int]], Iterator[T]]]:
    """A map over numbers by threads, in order, that stops at the first exception."""
    pool = ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1)), "bidm-look")

    def run(work: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
        chunks = [numbers[first : first + _CHUNK] for first in range(0, len(numbers), _CHUNK)]
        for results in pool.map(lambda chunk: [work(i) for i in chunk], chunks):
            yield from results

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _stamped(images: FileImages, index: int) -> FileFacts:
    try:
        size, stamp = images.stamp(index)
    except FileNotFoundError:
        return FileFacts(problem="is a link to a file that is gone")
    except OSError as error:
        return FileFacts(problem=f"cannot be opened: {error.strerror}")
    return FileFacts(size, stamp, problem="" if size else "is empty")


def _looked_at(images: FileImages, index: int, stamped: FileFacts, whole: bool) -> FileFacts:
    """Facts of a file by header and ends; decoded if ``whole``, or if its end is not as it should be."""
    try:
        with images.open(index) as handle:
            return _facts(handle, stamped, whole)
    except UnidentifiedImageError:
        problem = "is no image that Pillow can read"
    except BidmError as error:
        problem = str(error).removeprefix(f"{images.names[index]} in {images.path} ")
    except Exception as error:  # what Pillow's decoders raise cannot be listed
        problem = f"is not a readable image: {first_line(error)}"
    return FileFacts(stamped.size, stamped.stamp, problem=problem)


def _facts(handle: IO[bytes], stamped: FileFacts, whole: bool) -> FileFacts:
    head = handle.read(EDGE)
    handle.seek(max(0, stamped.size - EDGE))
    tail = handle.read()
    handle.seek(0)
    digest = zlib.crc32(tail, zlib.crc32(head))
    with Image.open(handle) as image:
        width, height, problem = image.width, image.height, refusal(image)
        kind = image.format
        turn = (
            orientation(image) if kind != "PNG" or "exif" in image.info else 1
        )  # getexif would decode a PNG
        if problem is None and (whole or not _ends_well(kind, head, tail, stamped.size)):
            image.load()
    if turn >= 5:
        width, height = height, width
    return FileFacts(stamped.size, stamped.stamp, width, height, turn != 1, digest, problem or "")


def _ends_well(kind: str | None, head: bytes, tail: bytes, size: int) -> bool:
    """True if a file of a kind that tells its end has it."""
    if kind in ("JPEG", "MPO"):
        return tail.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail.rstrip(b"\0\r\n ").endswith(b"IEND\xaeB`\x82")
    return kind == "WEBP" and int.from_bytes(head[4:8], "little") + 8 <= size


def _cache_path(path: Path) -> Path | None:
    try:
        key = hashlib.sha256(os.path.realpath(path).encode(errors="surrogateescape")).hexdigest()
        return cache_folder() / f"images-{key[:16]}.npz"
    except RuntimeError:  # no home folder
        return None


_FIELDS = ("size", "stamp", "width", "height", "turned", "digest")


def _remembered(path: Path | None) -> dict[str, FileFacts]:
    """Facts of usable files by name from a cache file; empty if it is missing or damaged."""
    if path is None or not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = json.loads(bytes(stored["names"]))
            columns = [stored[field].tolist() for field in _FIELDS]
        rows = zip(names, *columns, strict=True)
        return {
            name: FileFacts(size, stamp, w, h, bool(turned), digest)
            for name, size, stamp, w, h, turned, digest in rows
        }
    except Exception:  # any damage at all: it is looked at again
        return {}


def _remember(path: Path, names: Sequence[str], facts: list[FileFacts]) -> None:
    usable = [(name, one) for name, one in zip(names, facts, strict=True) if not one.problem]
    columns: dict[str, Any] = {
        field: np.array([getattr(one, field) for _, one in usable], dtype=np.int64) for field in _FIELDS
    }
    text = np.frombuffer(json.dumps([name for name, _ in usable]).encode(), np.uint8)
    with contextlib.suppress(BidmError), write_atomically(path) as temporary:
        np.savez_compressed(temporary, names=text, **columns)
