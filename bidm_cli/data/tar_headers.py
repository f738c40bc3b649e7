"""Headers of a tar archive, front to back: POSIX ustar and pax, GNU's and v7's; never trusted.

Formats: POSIX.1-2017 (pax), GNU tar's manual, Python's Lib/tarfile.py. Read here because tarfile ends at a
damaged header as if it were the end, and takes names of any length into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from bidm_cli.errors import BidmError

NAME_BYTES = 1 << 20
"""Largest extended header, which holds a long name."""
BLOCK = 512
_FILE = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = {
    b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "folder", b"6": "device", b"V": "label",
}  # fmt: skip


@dataclass(frozen=True)
class TarEntry:
    """A file, or what is left out, of an archive: its kind in words, first byte of its content and length."""

    name: str
    kind: str
    offset: int
    size: int


def tar_entries(handle: IO[bytes], where: str, end: int, compressed: bool) -> Iterator[TarEntry]:
    """All entries but folders, whose ``kind`` is empty for files; ``handle`` stands at a file's content.

    Args:
        end: size of the archive, or of a compressed one the most that it may unpack to.
    """
    at, more = 0, dict[str, str]()
    while True:
        block = _read_at(handle, at)
        if not block.strip(b"\0"):
            return
        head = _Header.parse(block, where, at)
        at += BLOCK
        if head.flag in (b"L", b"K", b"x", b"g"):
            more |= _extended(handle, head, where, at)
            at += _padded(head.size)
            continue
        if head.flag == b"S":
            at = _end_of_map(handle, block, where, at)
        entry, more = _entry(head, more, at), {}
        if at + entry.size > end:
            if compressed:
                claim = f"{entry.name} claims {entry.size:,}"
                raise BidmError(f"{where} would unpack to over {end:,} bytes ({claim})")
            raise _cut_short(where, entry.name)
        if entry.kind != "folder":
            handle.seek(at)
            yield entry
        if compressed and handle.seek(at + entry.size) != at + entry.size:
            raise _cut_short(where, entry.name)
        at += _padded(entry.size)


def _end_of_map(handle: IO[bytes], block: bytes, where: str, at: int) -> int:
    """First byte after the map of a sparse file (GNU), which goes on while a block says so."""
    place = 482
    while block[place]:
        block, at, place = _read_at(handle, at), at + BLOCK, 504
        if len(block) != BLOCK:
            raise _cut_short(where, "a sparse file")
    return at


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    flag: bytes

    @classmethod
    def parse(cls, block: bytes, where: str, at: int) -> _Header:
        try:
            if len(block) != BLOCK or number(block[148:156]) != checksum(block):
                raise ValueError
            size = number(block[124:136])
        except ValueError:
            wrong = f"{where} is damaged at byte {at:,}" if at else f"{where} is no tar archive, or damaged"
            raise BidmError(f"{wrong}; fetch it anew") from None
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        return cls(name, size, block[156:157])


def _entry(head: _Header, more: dict[str, str], at: int) -> TarEntry:
    """Entry of a header and what extended headers before it say; names are relative, without dots."""
    name, size = more.get("path", head.name), int(more.get("size", head.size))
    parts = [part for part in name.split("/") if part not in ("", ".")]
    kind = "" if head.flag in _FILE else _WITHOUT_CONTENT.get(head.flag, "entry of another kind")
    if head.flag in _WITHOUT_CONTENT:
        size = 0
    elif head.flag == b"S" or any(key.startswith("GNU.sparse") for key in more):
        kind = "sparse file"
    elif not kind and name.endswith("/"):
        kind = "folder"
    elif not kind and (".." in parts or not parts):
        kind = "name with .."
    return TarEntry("/".join(parts), kind, at, size)


def _extended(handle: IO[bytes], head: _Header, where: str, at: int) -> dict[str, str]:
    """Values of an extended header for the next entry: path, size and others."""
    if head.size > NAME_BYTES:
        raise BidmError(f"{where} is damaged at byte {at:,}: a name of {head.size:,} bytes")
    handle.seek(at)
    content = handle.read(head.size)
    if len(content) != head.size:
        raise _cut_short(where, head.name)
    if head.flag == b"L":
        return {"path": _text(content)}
    found: dict[str, str] = {}
    while head.flag == b"x" and content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        try:
            end = int(length)
            key, _, value = content[len(length) + 1 : end - 1].partition(b"=")
            if not len(length) < end <= len(content) or (key == b"size" and int(value) < 0):
                raise ValueError
        except ValueError:
            raise BidmError(f"{where} is damaged at byte {at:,}; fetch it anew") from None
        found[_text(key)] = _text(value)
        content = content[end:]
    return found


def _read_at(handle: IO[bytes], at: int) -> bytes:
    """The block at a place; empty at the end of the file, which some writers do not mark."""
    return handle.read(BLOCK) if handle.seek(at) == at else b""


def _cut_short(where: str, name: str) -> BidmError:
    return BidmError(f"{where} is cut short: it ends within {name}; fetch it anew")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def checksum(block: bytes) -> int:
    """Sum of a header's bytes, those of the checksum itself taken as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * 32


def number(digits: bytes) -> int:
    """Octal digits, or big-endian bytes after 0x80 (GNU).

    Raises:
        ValueError: neither.
    """
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    return int(digits.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(content: bytes) -> str:
    return content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
