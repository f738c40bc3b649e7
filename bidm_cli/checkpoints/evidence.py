"""Notes on a checkpoint by kind: read from the file, assumed, left out, or not readable.

    checkpoint.evidence.append(assumed("size 32x32 (assumed: the original's default; override with ...)"))
    for note in caveats_of(model): ...

Everything but what was read is a caveat, which commands say aloud before they work on the model.
Packed files keep the caveats of the checkpoint that they were made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast

from bidm_cli.errors import BidmError

Kind = Literal["read", "assumed", "left out", "unreadable"]
LABELS: dict[str, str] = {"assumed": "Assumed", "left out": "Left out", "unreadable": "Not readable"}
_NAMED_SETTINGS = re.compile(r"`settings` ([^)]*)")


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


def caveats_of(model: object) -> list[Note]:
    """Caveats of an opened checkpoint or first stage (``evidence``), or of what a packed file was made from
    (``caveats``).
    """
    kept = getattr(model, "caveats", None)
    if kept is None:
        return caveats(getattr(model, "evidence", ()))
    return [Note(item["text"], cast(Kind, item["kind"])) for item in kept]


def caveat_lines(model: object) -> list[str]:
    """One line per caveat of a model, as commands print them."""
    when = " when it was compressed" if hasattr(model, "caveats") else ""
    return [f"{LABELS.get(note.kind, note.kind)}{when}: {note}" for note in caveats_of(model)]


def caveats_json(model: object) -> list[dict[str, str]]:
    """Caveats of a model as records "kind", "text", without the names of the checkpoint's folders: the same
    checkpoint elsewhere gives the same packed file.
    """
    folders: set[Path] = set()
    if (source := getattr(model, "source", None)) is not None:
        for path in (Path(source), Path(source).resolve()):
            folders |= {path, path.parent}
    prefixes = sorted((f"{folder}/" for folder in folders if folder.name), key=len, reverse=True)
    records = []
    for note in caveats_of(model):
        text = str(note)
        for prefix in prefixes:
            text = text.replace(prefix, "")
        records.append({"kind": str(note.kind), "text": text})
    return records


def settled(evidence: Iterable[str], settings: Iterable[str]) -> list[str]:
    """``evidence`` in which an assumption is none any more if the user gives a setting that it names."""
    names = set(settings)

    def kept(note: str) -> str:
        is_assumed = isinstance(note, Note) and note.kind == "assumed"
        named = {word for part in _NAMED_SETTINGS.findall(note) for word in re.findall(r"\w+", part)}
        return Note(note) if is_assumed and named & names else note

    return [kept(note) for note in evidence]


def refuse_assumptions(model: object, path: str | Path) -> None:
    """Raise BidmError if anything about a model was assumed, or was not readable where it may be said."""
    found = [note for note in caveats_of(model) if note.kind != "left out"]
    if not found:
        return
    listed = "; ".join(f"({number}) {note}" for number, note in enumerate(found, 1))
    way_out = "say it with `settings` or `config`"
    if hasattr(model, "caveats"):
        way_out = "compress the original again with `settings` or `config` that say it"
    raise BidmError(
        f"{path}: {len(found)} assumed or not readable, which `strict` refuses: {listed}; {way_out}, or "
        "leave out `strict`"
    )
