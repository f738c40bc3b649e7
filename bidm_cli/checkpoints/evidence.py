"""Notes on a checkpoint by kind: read from the file, assumed, left out, or not readable.

    checkpoint.evidence.append(assumed("size 32x32 (assumed: the original's default; override with ...)"))
    for note in caveats(checkpoint.evidence): ...

Everything but what was read is a caveat, which commands say aloud before they work on the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Kind = Literal["read", "assumed", "left out", "unreadable"]


class Note(str):
    """One line of evidence with its kind; any other string counts as read from the file."""

    __slots__ = ("kind",)
    kind: Kind

    def __new__(cls, text: str, kind: Kind = "read") -> Note:
        note = super().__new__(cls, text)
        note.kind = kind
        return note


def assumed(text: str) -> Note:
    """Note on a value that neither the file nor its configuration says."""
    return Note(text, "assumed")


def left_out(text: str) -> Note:
    """Note on something in the file or its configuration that bidm does without."""
    return Note(text, "left out")


def unreadable(text: str) -> Note:
    """Note on a file beside the checkpoint that should have been read and could not be."""
    return Note(text, "unreadable")


def caveats(evidence: Iterable[str]) -> list[Note]:
    """The notes that are assumptions, omissions or failures to read, in their order."""
    return [note for note in evidence if isinstance(note, Note) and note.kind != "read"]
