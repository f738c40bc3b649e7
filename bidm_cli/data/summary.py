"""Summary of training data: one line for the user, and the record by which a run knows its data again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

NAMED = 3
"""Left-out files that the line names."""


@dataclass(frozen=True)
class DataSummary:
    """Training data of a run in words and digests.

    Attributes:
        kind: images; latents; arrays (pixels as floats); synthetic (the original's own samples).
        path: where it was found; None for synthetic.
        count: number of samples.
        size: sizes or shape, in words. values: range of the values and how they were taken, in words.
        conversion: factor and offset that bring the values to what the network denoises.
        classes: classes against the model's, in words; empty for a model without.
        labels: source of the labels; None for none.
        digest: hexadecimal SHA-256 over what they are (names, sizes, ends; or an array's values).
        labels_digest: the same over the labels.
        left_out: (name, reason) of files that cannot be used.
        notes: what about the way it was taken is not a matter of course.
    """

    kind: Literal["images", "latents", "arrays", "synthetic"]
    path: Path | None
    count: int
    size: str = ""
    values: str = ""
    conversion: tuple[float, float] = (1.0, 0.0)
    classes: str = ""
    labels: str | None = None
    digest: str = ""
    labels_digest: str = ""
    left_out: Sequence[tuple[str, str]] = ()
    notes: tuple[str, ...] = field(default=())

    def line(self) -> str:
        """One line: how many, sizes, range, classes, what is left out."""
        words = {"arrays": "arrays of floats", "synthetic": "samples of the original"}
        what = words.get(self.kind, self.kind)
        parts = [f"{self.count:,} {what}{' of ' if self.size else ''}{self.size}"]
        parts += [part for part in (self.values, self.classes, *self.notes) if part]
        if self.left_out:
            parts.append(f"{len(self.left_out):,} left out: {bad_text(self.left_out)}")
        where = "synthetic data" if self.path is None else str(self.path)
        return f"{where}: {'; '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Record for the run's folder and the packed file; without the path's folders."""
        return {
            "kind": self.kind,
            "name": None if self.path is None else self.path.name or self.path.resolve().name,
            "count": self.count,
            "size": self.size,
            "values": self.values,
            "conversion": list(self.conversion),
            "labels": self.labels,
            "classes": self.classes,
            "left_out": len(self.left_out),
            "digest": self.digest,
            "labels_digest": self.labels_digest,
        }


def bad_text(bad: Sequence[tuple[str, str]]) -> str:
    """The first few of the files that cannot be used, with reasons."""
    text = "; ".join(f"{name} {problem}" for name, problem in bad[:NAMED])
    return text if len(bad) <= NAMED else f"{text}; and {len(bad) - NAMED:,} more"


def sizes_text(sizes: Sequence[tuple[int, int]]) -> str:
    """Sizes (width, height) in words: "16x16", or the smallest and the largest by area."""
    found = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    texts = [f"{width}x{height}" for width, height in (found[:1] + found[-1:])]
    return texts[0] if len(found) == 1 else " to ".join(texts)
