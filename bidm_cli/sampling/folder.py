"""Sample folder: images of one setting on disk, drawn until none is missing, resumable at any point.

    000000.png ...    the images
    grid.png          the first 256 of them side by side
    samples.npz       all of them in ADM's layout, if asked for
    samples.npy       the floats before decoding, if asked for
    sample.json       the settings they were made with

Files appear whole or not at all, sample.json first. An image that is there is never drawn again; floats wait
in ``.raw`` until all are there.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from bidm_cli.data.arrays import map_array
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.interrupts import explained
from bidm_cli.locks import folder_lock
from bidm_cli.parallel.processes import SEEN_WITHIN, Processes
from bidm_cli.sampling.images import GRID_IMAGES, decode, grid, read_png, write_npy, write_npz, write_png
from bidm_cli.sampling.sample import Inputs, SamplingPlan

RECORD, GRID, ARRAY, RAW, PARTS = "sample.json", "grid.png", "samples.npz", "samples.npy", ".raw"
_IMAGE = re.compile(r"\d{6,}\.png")
_RESULT = re.compile(r"\d{6,}\.png|grid\.png|samples\.np[zy]")
_TEMPORARY = re.compile(r"\.(\d{6,}|grid|samples|sample)\.[0-9a-f]{8}\.(png|npz|npy|json)")


@dataclass(frozen=True)
class Drawn:
    """Result of :meth:`SampleFolder.fill`: images drawn, of them not finite, and seconds for all of it."""

    images: int
    not_finite: int
    seconds: float


class SampleFolder:
    """Images 0 .. n - 1 of one setting, in ``path``.

        folder = SampleFolder(path, settings, n)
        folder.fill(plan, inputs)

    Args:
        settings: everything the images depend on, plain JSON; a key "model" may hold a hash.
        n: number of images; a folder may grow by a later run, never shrink.
        images: write PNGs. raw, npz: write these arrays; once asked for, later runs keep them up to date.
        overwrite: begin anew instead of going on.
        processes: share the drawing out; the first one begins and finishes the folder.

    ``is_new`` is False if an earlier run began the folder.

    Raises:
        BidmError: the folder holds images of other settings or of unknown ones, cannot be written to, or
            another process draws into it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        n: int,
        *,
        images: bool = True,
        raw: bool = False,
        npz: bool = False,
        overwrite: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.path, self.n, self.images = Path(path), n, images
        self._processes = processes or Processes()
        found = self._begin(settings, raw, npz, overwrite) if self._processes.is_first else None
        self._processes.check_shared(self.path / RECORD)
        self.is_new, self.raw, self.npz = self._processes.from_first(found)

    def _begin(self, settings: dict[str, Any], raw: bool, npz: bool, overwrite: bool) -> tuple[bool, ...]:
        """Check what is there and write the record: (is new, keeps floats, keeps an array of the images)."""
        if self.path.exists() and not self.path.is_dir():
            raise BidmError(f"{self.path} is a file; choose another folder with `out`")
        with folder_lock(self.path, "choose another `out`"):
            return self._settle(settings, raw, npz, overwrite)

    def _settle(self, settings: dict[str, Any], raw: bool, npz: bool, overwrite: bool) -> tuple[bool, ...]:
        """:meth:`_begin`, in a folder to which no other process writes."""
        if overwrite:
            self._clear()
        record = self._record()
        if record:
            self._check(record, settings)
        elif found := self._results():
            self._refuse(f"{found[0]} without a {RECORD}")
        raw = raw or bool(record.get("raw"))
        npz = self.images and (npz or bool(record.get("npz")))
        self._remove(_TEMPORARY)
        wanted = {"settings": settings, "n": self.n, "raw": raw, "npz": npz}
        if record != wanted:
            with write_atomically(self.path / RECORD) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return not record, raw, npz

    @property
    def grid(self) -> Path:
        """File with the first images side by side."""
        return self.path / GRID

    def missing(self) -> list[int]:
        """Numbers of the images that are still to be drawn."""
        drawn = self._drawn() if self.images else set(range(self.n))
        if self.raw:
            parts = self.path / PARTS
            kept = {int(part.stem) for part in parts.glob("*.npy") if part.stem.isdigit()}
            drawn &= kept | set(range(len(self._raw_rows())))
        return [number for number in range(self.n) if number not in drawn]

    def fill(self, plan: SamplingPlan, inputs: Inputs) -> Drawn:
        """Draw the missing images, keep each batch as it is done, and finish the folder.

        Each of several processes draws every n-th batch, whole: images are the same for any number of them.

        Args:
            inputs: checked for the folder's n images from number 0.

        Raises:
            BidmError: the folder cannot be written to, another process draws into it, or the disk is full; or
                another process of the run was lost.
            Interrupted: a signal came; the images that are there stay.
        """
        lock: AbstractContextManager[object] = contextlib.nullcontext()
        if self._processes.is_first:
            lock = folder_lock(self.path, "choose another `out`")
        with lock, explained(self._how_to_go_on):
            return self._fill(plan, inputs)

    def _how_to_go_on(self) -> str:
        there = self.n - len(self.missing())
        return f"{there} of {self.n} images are in {self.path}; the same command draws the others"

    def _fill(self, plan: SamplingPlan, inputs: Inputs) -> Drawn:
        missing = set(self._processes.from_first(self.missing() if self._processes.is_first else None))
        batches = [batch for batch in plan.batches(0, self.n) if missing.intersection(batch.numbers)]
        batches = batches[self._processes.rank :: self._processes.size]
        not_finite, began = 0, time.perf_counter()
        with tqdm(total=len(batches) * len(plan.steps), unit="step", desc="sampling", disable=None) as bar:
            for batch in batches:
                # A whole batch even if few are missing: on a GPU the bits depend on its size.
                latents = plan.run(batch, inputs, bar.update)
                wanted = [i for i, number in enumerate(batch.numbers) if number in missing]
                not_finite += int((~torch.isfinite(latents[wanted]).flatten(1).all(dim=1)).sum())
                images = decode(plan.model, latents[wanted]) if self.images else None
                for position, i in enumerate(wanted):
                    image = None if images is None else images[position]
                    self.add(batch.numbers[i], image, latents[i].cpu().numpy())
        not_finite = sum(self._processes.gathered(not_finite))
        if self._processes.is_first:
            self._wait_for_others()
            self.finish(None if inputs.labels is None else inputs.labels.tolist())
        self._processes.wait()
        return Drawn(len(missing), not_finite, time.perf_counter() - began)

    def _wait_for_others(self) -> None:
        """Wait until the images that other machines have written are seen here, too.

        Raises:
            BidmError: they do not appear.
        """
        deadline = time.monotonic() + (SEEN_WITHIN if self._processes.size > 1 else 0)
        while (missing := self.missing()) and time.monotonic() < deadline:
            time.sleep(0.5)
        if missing:
            raise BidmError(
                f"{len(missing)} images that were drawn are not in {self.path}, {missing[0]} is the first; "
                "run the same command again, and give all machines the same folder"
            )

    def add(self, number: int, image: np.ndarray | None, latent: np.ndarray) -> None:
        """Keep image ``number``: uint8 [H, W, C], and its float latent [C, H, W]."""
        for stale in (GRID, ARRAY):
            (self.path / stale).unlink(missing_ok=True)
        if self.raw:
            write_npy(self.path / PARTS / f"{number:06d}.npy", latent)
        if image is not None:
            write_png(self._png(number), image)

    def finish(self, labels: list[int] | None = None) -> None:
        """Write the grid and the arrays, once nothing is missing; what is there and up to date stays."""
        rows = self._raw_rows() if self.raw else np.empty(0)
        if self.raw and len(rows) != self.n:
            parts = [np.load(self.path / PARTS / f"{i:06d}.npy") for i in range(len(rows), self.n)]
            write_npy(self.path / RAW, np.concatenate([*([rows] if len(rows) else []), np.stack(parts)]))
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        if self.images and not (self.path / GRID).exists():
            write_png(self.path / GRID, grid(self._read(min(self.n, GRID_IMAGES))))
        if self.npz and not (self.path / ARRAY).exists():
            write_npz(self.path / ARRAY, self._read(self.n), labels)

    def _png(self, number: int) -> Path:
        return self.path / f"{number:06d}.png"

    def _drawn(self) -> set[int]:
        """Numbers of the PNGs that are there."""
        entries = self.path.iterdir() if self.path.is_dir() else []
        return {int(entry.stem) for entry in entries if _IMAGE.fullmatch(entry.name)}

    def _results(self) -> list[str]:
        """Names of what a run writes that are there."""
        entries = self.path.iterdir() if self.path.is_dir() else []
        return sorted(entry.name for entry in entries if _RESULT.fullmatch(entry.name))

    def _raw_rows(self) -> np.ndarray:
        """Content of samples.npy, [m, C, H, W]; m may be less than n, and 0 without the file."""
        path = self.path / RAW
        try:
            return map_array(path)
        except FileNotFoundError:
            return np.empty((0,), dtype=np.float32)
        except (OSError, BidmError) as error:
            raise BidmError(f"{path} cannot be read; delete it and run the same command again") from error

    def _read(self, count: int) -> np.ndarray:
        """The first ``count`` PNGs, uint8 [count, H, W, C]."""
        first = read_png(self._png(0))
        images = np.empty((count, *first.shape), dtype=np.uint8)
        for i in range(count):
            images[i] = read_png(self._png(i))
        return images

    def _record(self) -> dict[str, Any]:
        path = self.path / RECORD
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record["settings"], dict) and isinstance(record["n"], int):
                return record
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise BidmError(f"{path} is damaged; choose another `out`, or `overwrite` to begin anew")

    def _check(self, record: dict[str, Any], settings: dict[str, Any]) -> None:
        for key, value in settings.items():
            earlier = record["settings"].get(key)
            if earlier != value and key == "model":
                self._refuse("images of another model")
            if earlier != value:
                old, new = ("none" if v is None else v for v in (earlier, value))
                self._refuse(f"images made with {key} {old}, not {new}")
        if record["n"] > self.n:
            self._refuse(f"{record['n']} images, more than the {self.n} asked for")

    def _refuse(self, content: str) -> NoReturn:
        raise BidmError(f"{self.path} holds {content}; choose another `out`, or `overwrite` to replace them")

    def _clear(self) -> None:
        """Remove what a run wrote, the record last; other files stay."""
        self._remove(_RESULT)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        (self.path / RECORD).unlink(missing_ok=True)

    def _remove(self, pattern: re.Pattern[str]) -> None:
        if self.path.is_dir():
            for entry in self.path.iterdir():
                if pattern.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
