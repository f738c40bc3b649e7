"""Error of a packed first stage: its pictures against the original decoder's, of the same latents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.training_data import TrainingData
from bidm_cli.distill.trajectory import trajectory_images
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.packed.format.read import read_first_stage


@torch.no_grad()
def decoder_error(
    teacher: DiffusionModel, metadata: dict[str, Any], tensors: dict[str, Tensor], data: TrainingData
) -> dict[str, Any] | None:
    """Peak signal-to-noise ratio of the packed decoder's pictures, over latents spread evenly over the data.

    Args:
        metadata, tensors: contents of the packed file.

    Returns:
        JSON: ``psnr`` in dB, of images in [-1, 1], None where they are the same; ``n``, number of latents.
        None without a first stage.
    """
    if not isinstance(teacher.first_stage, FirstStage):
        return None
    stage = read_first_stage(metadata, tensors, teacher.device)
    assert isinstance(stage, FirstStage)
    n = min(len(data), trajectory_images(teacher))
    indices = torch.linspace(0, len(data) - 1, n).long()
    latents, _ = data.batch(indices, torch.Generator().manual_seed(0))
    total = 0.0
    for z in latents.split(1):
        images = [image.clamp(-1, 1) for image in (teacher.decode(z), stage.decode(z / teacher.scale_factor))]
        total += float((images[0] - images[1]).square().mean())
    return {"psnr": round(10 * math.log10(4 * n / total), 2) if total else None, "n": n}
