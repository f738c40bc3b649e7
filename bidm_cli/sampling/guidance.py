"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), and the memory of connections."""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel, Memory
from bidm_cli.errors import BidmError
from bidm_cli.packed.cuda_graph import denoisers_of
from bidm_cli.packed.gpu_memory import explaining_memory


class GuidedDenoiser:
    """A model that denoises one batch from step to step: ``denoiser(x, t)``.

    e = e_u + s (e_c - e_u), from one pass with the labels and one with the null label. Each pass keeps its
    own features for cross-timestep connections: a blend of both would belong to neither. With s = 1 only the
    pass with the labels runs.

    Args:
        labels: [N], or None for an unconditional model.
        guidance: the scale s.

    Raises:
        BidmError: labels missing or out of range, or guidance without a null label.
    """

    def __init__(self, model: DiffusionModel, labels: Tensor | None, guidance: float = 1.0) -> None:
        self.model, self.guidance = model, guidance
        self.conditions = [model.condition(labels)]
        self.memories: list[Memory] = [{}]
        if guidance != 1.0:
            check_guidance(model)
            assert labels is not None
            null = torch.full_like(labels, model.null_label)  # type: ignore[arg-type]
            self.conditions.append(model.condition(null))
            self.memories.append({})
        self.denoisers = denoisers_of(model, len(self.conditions))

    def __call__(self, x: Tensor, t: int, x_self: Tensor | None = None) -> Tensor:
        """The network's (guided) output for x [N, C, H, W], all at timestep ``t``.

        ``x_self`` is the x0 of the step before, for self-conditioned networks.

        Raises:
            BidmError: not enough memory on a GPU; it names a batch size that fits.
        """
        given = {} if x_self is None else {"x_self": x_self}
        times = torch.full((len(x),), t, device=x.device, dtype=torch.long)
        passes = zip(self.denoisers, self.conditions, self.memories, strict=True)
        with explaining_memory(self.model, len(x)):
            outputs = [
                denoise(x, times, context, y, memory, **given) for denoise, (context, y), memory in passes
            ]
        if len(outputs) == 1:
            return outputs[0]
        conditional, unconditional = outputs
        # A learned variance and the channels a family leaves alone stay those of the conditional pass.
        guided = self.model.convention.guided_channels or x.shape[1]
        e_c, e_u = conditional[:, :guided], unconditional[:, :guided]
        return torch.cat([e_u + self.guidance * (e_c - e_u), conditional[:, guided:]], dim=1)


def check_guidance(model: DiffusionModel) -> None:
    """Raise BidmError unless the model has a null label, that is, was trained for guidance."""
    if model.null_label is None:
        raise BidmError(
            "this model has no null label, so classifier-free guidance cannot be used; leave out --guidance"
        )
