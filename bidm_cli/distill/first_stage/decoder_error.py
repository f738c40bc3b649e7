"""Error of a packed first stage: its pictures against the original decoder's, of the same latents."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.first_stage.ssim import ssim
from bidm_cli.distill.training_data import TrainingData
from bidm_cli.distill.trajectory import trajectory_images
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.packed.format.read import read_first_stage


@torch.no_grad()
def decoder_error(
    teacher: DiffusionModel, metadata: dict[str, Any], tensors: dict[str, Tensor], data: TrainingData
) -> dict[str, Any] | None:
    """Errors of the packed decoder's pictures, over latents spread evenly over the data.

    Args:
        metadata, tensors: contents of the packed file.

    Returns:
        JSON: ``psnr``, the peak signal-to-noise ratio in dB of images in [-1, 1], None where they are the
        same; ``ssim`` (:mod:`bidm_cli.distill.first_stage.ssim`); ``n``, number of latents. None without a
        first stage.
    """
    if not isinstance(teacher.first_stage, FirstStage):
        return None
    stage = read_first_stage(metadata, tensors, teacher.device)
    assert isinstance(stage, FirstStage)
    n = min(len(data), trajectory_images(teacher))
    indices = torch.linspace(0, len(data) - 1, n).long()
    latents, _ = data.batch(indices, torch.Generator().manual_seed(0))
    decoded = ((teacher.decode(z), stage.decode(z / teacher.scale_factor)) for z in latents.split(1))
    return picture_errors(decoded)


def picture_errors(decoded: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """JSON of :func:`decoder_error` for pairs of images [1, C, H, W], the original decoder's first."""
    squares, similarities, n = 0.0, 0.0, 0
    for pair in decoded:
        first, second = (image.clamp(-1, 1) for image in pair)
        squares += float((first - second).square().mean())
        similarities += ssim((first + 1) / 2, (second + 1) / 2)
        n += 1
    psnr = round(10 * math.log10(4 * n / squares), 2) if squares else None
    return {"psnr": psnr, "ssim": round(similarities / n, 5), "n": n}
