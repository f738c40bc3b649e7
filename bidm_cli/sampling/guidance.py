"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), with carried features per pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.model import CarriedFeatures, DiffusionModel
from bidm_cli.packed.recording.denoiser import denoisers_of
from bidm_cli.sampling.gpu_memory import explaining_memory


class GuidedDenoiser:
    """Denoiser of one batch from step to step, under ``condition`` of its N images: ``denoiser(x, t)``.

    e = e_u + s (e_c - e_u), s = ``guidance``, from one pass with the condition and one with the null label or
    null context. Each pass carries its own features: a blend of both would belong to neither. With s = 1 only
    the pass with the condition runs.

    Raises:
        BidmError: guidance of a model that knows no null label and no null context.
    """

    def __init__(self, model: DiffusionModel, condition: Condition, guidance: float = 1.0) -> None:
        self.model, self.guidance = model, guidance
        self.conditions = [condition]
        if guidance != 1.0:
            self.conditions.append(model.unconditional(condition))
        self.carried: list[CarriedFeatures] = [{} for _ in self.conditions]
        self.denoisers = denoisers_of(model, len(self.conditions))

    def __call__(self, x: Tensor, t: int, x_self: Tensor | None = None) -> Tensor:
        """Network output (guided) for x [N, C, H, W], all at timestep ``t``.

        ``x_self`` is the x0 of the step before, for self-conditioned networks. BidmError names a batch size
        that fits where a GPU has not enough memory.
        """
        more = {} if x_self is None else {"x_self": x_self}
        times = torch.full((len(x),), t, device=x.device, dtype=torch.long)
        passes = zip(self.denoisers, self.conditions, self.carried, strict=True)
        with explaining_memory(self.model, len(x)):
            outputs = [
                denoise(condition.join(x), times, condition.context, condition.y, carried, **more)
                for denoise, condition, carried in passes
            ]
        if len(outputs) == 1:
            return outputs[0]
        conditional, unconditional = outputs
        # A learned variance and the channels a family leaves alone stay those of the conditional pass.
        guided = self.model.convention.guided_channels or x.shape[1]
        e_c, e_u = conditional[:, :guided], unconditional[:, :guided]
        return torch.cat([e_u + self.guidance * (e_c - e_u), conditional[:, guided:]], dim=1)
