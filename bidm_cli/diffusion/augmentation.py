"""Noise on the small image that an upscaler starts from; the network takes its level as a label.

Stable Diffusion's x4 upscaler was trained so: z = sqrt(a) x + sqrt(1 - a) noise at alpha-bar a of the level
(Stability-AI/stablediffusion: ImageConcatWithNoiseAugmentation in ldm/modules/diffusionmodules/upscaling.py,
LatentUpscaleDiffusion in ldm/models/diffusion/ddpm.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class NoiseAugmentation:
    """Attributes:
    schedule: alpha-bar of each level.
    levels: how many of them the network was trained on, from 0.
    """

    schedule: NoiseSchedule
    levels: int

    def apply(self, images: Tensor, levels: Tensor) -> Tensor:
        """Images [N, K, H, W] in [-1, 1] with the noise of ``levels`` [N].

        The noise depends on the level alone, so that an image does not depend on those drawn beside it.
        """
        generators = (torch.Generator().manual_seed(int(level)) for level in levels.tolist())
        noises = [torch.randn(images.shape[1:], generator=generator) for generator in generators]
        return self.schedule.add_noise(images, torch.stack(noises).to(images), levels)

    def to_json(self) -> dict[str, Any]:
        return {"schedule": self.schedule.description, "levels": self.levels}

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> NoiseAugmentation | None:
        """The reverse of :meth:`to_json`; None for None."""
        if values is None:
            return None
        return cls(NoiseSchedule.from_description(values["schedule"]), int(values["levels"]))
