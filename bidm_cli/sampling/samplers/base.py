"""Base class of the samplers, and the decorator that registers them.

    sampler = DDIM(steps)
    for index, step in enumerate(sampler.steps):
        x = sampler.advance(index, x, estimate(...), draw)

One sampler object runs one batch once: multistep methods remember earlier estimates. Modules of this folder
are found by themselves, others have to be imported. Recipes, ``bidm sample`` and
:func:`bidm_cli.sample` then know the name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.registry import SAMPLERS
from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.timesteps import Step

Draw = Callable[[], Tensor]
"""Fresh Gaussian noise of one step, [N, C, H, W]."""

register_sampler = SAMPLERS.register
"""Class decorator that registers a :class:`Sampler` under a name."""


class Sampler:
    """Rule that moves x from one timestep to the next.

    Attributes:
        takes_eta: True if ``eta``, the share of fresh noise, may be other than 0.
        ancestral: True if timesteps and clipping follow the family's ancestral sampler instead of its DDIM.
        precision: of the coefficients; diffusers works in float32, which shows where they are differences.
    """

    takes_eta: ClassVar[bool] = False
    ancestral: ClassVar[bool] = False

    def __init__(
        self, steps: Sequence[Step], convention: SamplingConvention = SamplingConvention(), eta: float = 0.0
    ) -> None:
        self.steps, self.convention, self.eta = list(steps), convention, eta
        self.precision = torch.float32 if convention.float32_coefficients else torch.float64

    def bars(self, index: int) -> tuple[Tensor, Tensor]:
        """alpha-bar before and after step ``index``, without dimensions."""
        step = self.steps[index]
        before, after = torch.tensor([step.alpha_bar, step.alpha_bar_next], dtype=self.precision)
        return before, after

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        """x [N, C, H, W] after step ``index``, from the network's estimate for x before it."""
        raise NotImplementedError
