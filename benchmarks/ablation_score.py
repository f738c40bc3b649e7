"""Scores of a student: its samples against the data and against the original's from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ablation_domains import Domain
from torch import Tensor

import bidm_cli
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.files import write_atomically
from bidm_cli.report.cost.cost import cost
from bidm_cli.report.metrics.base import SetStatistics, statistics_of
from bidm_cli.report.metrics.compare import compare
from bidm_cli.sampling.images import grid, to_uint8, write_png

GRID = 128


@dataclass(frozen=True)
class Drawn:
    """Samples of a model: latents [n, C, H, W], images uint8 [n, H, W, 3] as a file, and their statistics."""

    latents: Tensor
    images: np.ndarray
    statistics: SetStatistics


class Judge:
    """Draws, keeps and compares samples; the original's and the data's statistics are found once.

    Args:
        sampler, steps: of the students; the original has the domain's DDIM.
    """

    def __init__(self, domain: Domain, n: int, work: Path, sampler: str, steps: int) -> None:
        self.domain, self.n, self.work, self.sampler, self.steps = domain, n, work, sampler, steps
        self.network = domain.features()
        self.reference = statistics_of(domain.reference, self.network, cached=True)
        self.teacher = bidm_cli.load_checkpoint(domain.checkpoint)
        self.original = self.drawn(self.teacher, "original", "ddim", domain.steps)

    def drawn(self, model: DiffusionModel, name: str, sampler: str, steps: int) -> Drawn:
        """Samples 0 .. n-1 of seed 0, drawn once and kept."""
        file = self.work / f"{name}.samples.npz"
        if not file.exists():
            latents = bidm_cli.sample(model, n=self.n, seed=0, sampler=sampler, steps=steps)
            images = np.concatenate([to_uint8(self.teacher.decode(part)) for part in latents.split(64)])
            with write_atomically(file) as temporary, open(temporary, "wb") as opened:
                np.savez(opened, images=images, latents=latents.numpy())
            write_png(file.with_suffix(".png"), grid(images[:GRID]))
        with np.load(file) as kept:
            latents, images = torch.from_numpy(kept["latents"]), kept["images"]
        pictures = self.work / f"{name}.images.npz"
        if not pictures.exists():
            with write_atomically(pictures) as temporary, open(temporary, "wb") as opened:
                np.savez(opened, images=images)
        return Drawn(latents, images, statistics_of(pictures, self.network, cached=True))

    def original_row(self) -> dict[str, float | None]:
        """Numbers of the original itself."""
        score = compare(self.original.statistics, self.reference, self.network).values
        return {"fd_data": score["value"], "precision": score["precision"], "recall": score["recall"]}

    @torch.no_grad()
    def score(self, path: Path) -> dict[str, float | None]:
        """Numbers of a packed file."""
        packed = bidm_cli.load_packed(path)
        drawn = self.drawn(packed, f"{path.stem}-{self.sampler}{self.steps}", self.sampler, self.steps)
        data = compare(drawn.statistics, self.reference, self.network).values
        teacher = compare(drawn.statistics, self.original.statistics, self.network).values
        costs = cost(packed)
        pixels = [a.astype(np.float32) / 127.5 for a in (drawn.images, self.original.images)]
        return {
            "free_error": float((drawn.latents - self.original.latents).square().mean()),
            "pixel_error": float(np.square(pixels[0] - pixels[1]).mean()),
            "fd_data": data["value"],
            "fd_teacher": teacher["value"],
            "precision": data["precision"],
            "recall": data["recall"],
            "file_bytes": path.stat().st_size,
            "storage_ratio": costs.storage_ratio,
            "ops_ratio": costs.ops_ratio,
        }
