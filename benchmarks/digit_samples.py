"""Free samples of packed digit models against the original's: distance, share of the same digit, a grid.

    python benchmarks/digit_samples.py w1a1.bidm w1a2.bidm --grids grids/ --record

Per model, from the same noise as the original: FD (Frechet distance to the 1,797 training digits on the
features of benchmarks/digit_classifier.py; compares such models with each other and with nothing else), the
share of samples that are the original's digit, and the mean squared distance to the original's samples. All
are drawn by each file's own sampler. The original is the first row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from digit_classifier import DigitClassifier, digits
from record import HERE, add_record_option, record
from torch import Tensor

import bidm_cli
from bidm_cli.report.metrics.base import SetStatistics
from bidm_cli.report.metrics.frechet import frechet_distance
from bidm_cli.sampling.images import grid, to_uint8, write_png

ORIGINAL = HERE.parent / "bidm_cli" / "demo" / "digits.pth"


class Judge:
    """Scores of samples against the digits and the original's samples from the same noise."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self.classifier = DigitClassifier.load()
        self.reference = self.statistics(digits()[0])
        self.original: Tensor = torch.empty(0)

    def statistics(self, images: Tensor) -> SetStatistics:
        """Mean and covariance of the classifier's features of images [N, 1, 8, 8] in [-1, 1]."""
        features = self.classifier.features(images.clamp(-1, 1)).double().numpy()
        about = {"path": Path(), "count": len(images), "sha256": "", "hashed": "pixels", "size": (8, 8)}
        moments = {"mean": features.mean(0), "covariance": np.cov(features, rowvar=False)}
        return SetStatistics(**about, **moments)  # type: ignore[arg-type]

    def score(self, path: Path, **drawn: int | str | None) -> tuple[dict[str, float], Tensor]:
        """(numbers, samples [n, 1, 8, 8]) of a model; the first one scored is the original."""
        packed = path.suffix == ".bidm"
        model = bidm_cli.load_packed(path) if packed else bidm_cli.load_checkpoint(path)
        images = bidm_cli.sample(model, n=self.n, seed=self.seed, **drawn).clamp(-1, 1)
        if not len(self.original):
            self.original = images
        same = self.classifier(images).argmax(1) == self.classifier(self.original).argmax(1)
        numbers = {
            "fd": frechet_distance(self.statistics(images), self.reference),
            "same_digit": float(same.float().mean()),
            "distance": float((images - self.original).square().mean()),
        }
        return numbers, images


def main() -> None:
    """Score the files and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("-n", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", help="of the packed files; the original always has 50 steps of DDIM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=Path, help="folder for a grid of the first 128 samples of each")
    add_record_option(parser, "digit_samples")
    chosen = parser.parse_args()
    judge, rows = Judge(chosen.n, chosen.seed), {}
    print("| model | FD | same digit | distance |\n|---|---|---|---|")
    for path in [ORIGINAL, *chosen.files]:
        drawn = {"steps": chosen.steps, "sampler": chosen.sampler} if path != ORIGINAL else {"steps": 50}
        numbers, images = judge.score(path, **drawn)
        rows[path.stem] = numbers
        print(
            f"| {path.stem} | {numbers['fd']:.2f} | {numbers['same_digit']:.2f} | {numbers['distance']:.3f} |"
        )
        if chosen.grids:
            chosen.grids.mkdir(parents=True, exist_ok=True)
            write_png(chosen.grids / f"{path.stem}.png", grid(to_uint8(images[:128])))
    if chosen.record:
        record(chosen.record, rows, n=chosen.n, steps=chosen.steps, sampler=chosen.sampler or "ddim")


if __name__ == "__main__":
    main()
