"""Domains of the ablation: a checkpoint, its training data and the base recipe.

faces: the bundled LDM-4 (3x8x8 latents of 32x32 faces).
digits: the bundled pixel model (8x8 digits), judged by the features of benchmarks/digit_classifier.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from digit_classifier import WEIGHTS, DigitClassifier
from record import HERE

from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.features import FeatureNetwork, load_features

DEMO = HERE.parent / "bidm_cli" / "demo"


@dataclass(frozen=True)
class Domain:
    """A checkpoint and what students of it are trained on.

    Attributes:
        data: images to distil on. reference: real images that samples are compared with.
        recipe: the base recipe, ``w1a1`` of the domain. features: of the Frechet distance.
        steps: of the original's DDIM sampler.
    """

    checkpoint: Path
    data: Path
    reference: Path
    recipe: Path
    features: Callable[[], FeatureNetwork]
    steps: int = 50


def face_features() -> FeatureNetwork:
    """EfficientNet-Lite0's 1,280 features."""
    return load_features("efficientnet-lite0")


def digit_features() -> FeatureNetwork:
    """The 64 features of the digit classifier, for images [N, 3, 8, 8] in [0, 1]."""
    classifier = DigitClassifier.load()
    return FeatureNetwork(
        name="digits",
        dims=64,
        resize="none",
        weights_sha256=sha256_of(WEIGHTS),
        published=False,
        forward=lambda x: classifier.features(x[:, :1] * 2 - 1),
        device=torch.device("cpu"),
        title="digit classifier",
    )


DOMAINS = {
    "faces": Domain(
        DEMO / "ldm4_peeps.ckpt",
        DEMO / "faces.npz",
        DEMO / "faces.npz",
        DEMO / "faces-w1a1.yaml",
        face_features,
    ),
    "digits": Domain(
        DEMO / "digits.pth",
        DEMO / "digits.npz",
        DEMO / "digits.npz",
        DEMO / "digits-w1a1.yaml",
        digit_features,
    ),
}
