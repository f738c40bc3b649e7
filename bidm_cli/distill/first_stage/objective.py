"""Loss of a binary decoder: its pictures against the original decoder's, of the same latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.parallel.share import Share
from bidm_cli.recipe import StageTrain
from bidm_cli.transfer import to_device


@dataclass
class DecoderLosses:
    """Scalars of one step: total, mean |difference| of pixels, and that of their gradients."""

    total: Tensor
    pixel: Tensor
    gradient: Tensor


@dataclass
class DecoderTargets:
    """Latents x [N, C, h, w] as the decoder takes them, and the original's images [N, 3, H, W] of them."""

    x: Tensor
    images: Tensor


@dataclass(frozen=True)
class DecoderDraws:
    """Random choices of a batch: noise [N, C, h, w] that is added to the latents."""

    noise: Tensor

    def rows(self, share: Share) -> DecoderDraws:
        """The choices for the rows of ``share`` alone."""
        return DecoderDraws(share.of(self.noise))


class DecoderObjective:
    """The loss of :class:`bidm_cli.recipe.StageTrain` for ``student.unet``, a decoder.

    Args:
        teacher: ``unet`` is the original decoder.
    """

    connected = False

    def __init__(self, teacher: DiffusionModel, student: DiffusionModel, settings: StageTrain) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings

    def draws(self, n: int, condition: Condition, generator: torch.Generator) -> DecoderDraws:
        """Random choices for a batch of ``n``."""
        return DecoderDraws(torch.randn(n, *self.teacher.sample_shape, generator=generator))

    @torch.no_grad()
    def prepare(self, x0: Tensor, condition: Condition, draws: DecoderDraws) -> DecoderTargets:
        """The original's images of x0 [N, C, h, w], latents of the data, with noise added."""
        noise = to_device(draws.noise, x0.device, x0.dtype)
        z = (x0 + self.settings.noise * noise) / self.teacher.scale_factor
        return DecoderTargets(z, self.teacher.unet(z))

    def losses(self, targets: DecoderTargets) -> DecoderLosses:
        """Losses of the student's images of the same latents."""
        images, settings = self.student.unet(targets.x), self.settings
        pixel, gradient = F.l1_loss(images, targets.images), gradient_loss(images, targets.images)
        square = F.mse_loss(images, targets.images)
        total = pixel + settings.gradients * gradient + settings.squares * square
        return DecoderLosses(total, pixel, gradient)


def gradient_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Mean |difference| of differences between neighbours in a column, plus that in a row, [N, C, H, W]."""
    return sum(
        (F.l1_loss(images.diff(dim=axis), targets.diff(dim=axis)) for axis in (2, 3)),
        start=images.new_zeros(()),
    )
