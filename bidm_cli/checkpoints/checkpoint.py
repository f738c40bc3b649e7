"""An original checkpoint, opened: network, schedule and first stage, and how bidm came to know them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.files import sha256_of


@dataclass
class Checkpoint(DiffusionModel):
    """An original checkpoint, as :func:`bidm_cli.checkpoints.open.load_checkpoint` gives it.

    Attributes:
        source: the file.
        evidence: what identified the family, where each setting comes from, and what had to be assumed.
        ema: whether these are the averaged (EMA) weights.
        has_weights: False for a bare configuration, whose networks are on the meta device.
    """

    source: Path = Path()
    evidence: list[str] = field(default_factory=list)
    ema: bool = False
    has_weights: bool = True

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the source file, computed when first asked for."""
        return sha256_of(self.source)

    def to(self, device: str | torch.device) -> Checkpoint:
        """Move network, first stage and conditioner; returns self. A bare configuration stays where it is."""
        if self.has_weights:
            super().to(device)
        return self
