"""Training, packing and sampling of the bundled digits, and the files they end in."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.processes import done

_DATA = ("--data", "demo/digits.npz", "--batch-size", 2)
_TRAINING = ("compress", "demo/digits.pth", "--recipe", "demo/digits-w1a1.yaml", *_DATA)


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        words: its command. again: words that continue it, after it was interrupted.
        results: files and folders that it writes, of which :func:`content` tells what must not differ.
        needs: results of other work that it begins with.
        processes: number that share it out.
    """

    name: str
    words: tuple[object, ...]
    again: tuple[object, ...]
    results: tuple[str, ...]
    needs: tuple[str, ...] = ()
    processes: int = 1

    def begun(self, folder: Path) -> bool:
        """True once the folder that it writes to is there."""
        return (folder / ("samples" if "samples" in self.results else "run")).exists()


TRAIN = (*_TRAINING, "--steps", 12, "--run-dir", "run")
WORKS = (
    Work("training", (*TRAIN, "--no-trajectory", "-o", "a.bidm"), ("--resume",), ("run/log.csv", "a.bidm")),
    Work(
        "packing", (*TRAIN, "--resume", "--trajectory-points", 3, "-o", "b.bidm"), (), ("b.bidm",), ("run",),
    ),
    Work(
        "sampling",
        (
            "sample", "a.bidm", "-n", 64, "--steps", 8, "--batch-size", 4, "--backend", "torch", "--raw",
            "--npz", "--out", "samples",
        ),
        (), ("samples",), ("a.bidm",),
    ),
)  # fmt: skip
WORKS_OF_TWO = tuple(
    replace(work, name=f"{work.name} by 2", words=(*work.words, "--processes", 2), processes=2)
    for work in (WORKS[0], WORKS[2])
)


def prepare(folder: Path, works: Sequence[Work] = WORKS) -> Path:
    """Folder ``whole`` with the results of ``works`` and of the training they begin with, uninterrupted."""
    whole = folder / "whole"
    whole.mkdir()
    done(["demo", "demo"], whole)
    training = [work for work in works if not work.needs] or [WORKS[0]]
    for work in dict.fromkeys((*training, *works)):
        done(work.words, whole)
    return whole


def begin(work: Work, whole: Path, folder: Path) -> None:
    """Make ``folder`` with what ``work`` begins with."""
    folder.mkdir()
    (folder / "demo").symlink_to(whole / "demo")
    for name in work.needs:
        source = whole / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for result in folder.glob("run/result.json"):
        result.unlink()


def content(folder: Path, work: Work) -> dict[str, bytes]:
    """Bytes of the results of ``work`` by name; leftovers would be among them."""
    files = [
        file
        for name in work.results
        for file in [folder / name, *(folder / name).rglob("*")]
        if file.is_file()
    ]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks that are left in ``folder``, and in the run and sample folders there."""
    return [path.name for name in (".", "run", "samples") for path in (folder / name).glob(".*")]
