"""Domains of the ablation: a checkpoint, its training data and the base recipe.

faces: the bundled LDM-4 (3x8x8 latents of 32x32 faces).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from record import HERE

DEMO = HERE.parent / "bidm_cli" / "demo"


@dataclass(frozen=True)
class Domain:
    """A checkpoint and what students of it are trained on.

    Attributes:
        data: images to distil on. reference: real images that samples are compared with.
        recipe: the base recipe, ``w1a1`` of the domain. steps: steps of the DDIM sampler.
    """

    checkpoint: Path
    data: Path
    reference: Path
    recipe: Path
    steps: int = 50


DOMAINS = {
    "faces": Domain(
        DEMO / "ldm4_peeps.ckpt", DEMO / "faces.npz", DEMO / "faces.npz", DEMO / "faces-w1a1.yaml"
    ),
}
