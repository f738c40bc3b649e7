"""Base class of the samplers, and the decorator that registers them.

    sampler = DDIM(steps)
    for index, step in enumerate(sampler.steps):
        x = sampler.advance(index, x, estimate(...), draw)

One sampler object runs one batch once: multistep methods remember earlier estimates. A new sampler is one
module with a class under ``@register_sampler("name")``; in this folder it is found by itself, elsewhere its
module has to be imported. Recipes, ``bidm sample --sampler`` and :func:`bidm_cli.sample` then know the name.
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

    ``precision``: of the coefficients; diffusers works in float32, which shows where they are differences.

    Attributes:
        takes_eta: whether ``eta``, the share of fresh noise, may be other than 0.
        ancestral: whether timesteps and clipping follow the family's ancestral sampler instead of its DDIM.
    """

    takes_eta: ClassVar[bool] = False
    ancestral: ClassVar[bool] = False

    def __init__(self, steps: Sequence[Step], precision: torch.dtype = torch.float64) -> None:
        self.steps, self.precision = list(steps), precision

    @classmethod
    def create(
        cls, steps: Sequence[Step], convention: SamplingConvention, eta: float, precision: torch.dtype
    ) -> Sampler:
        """Sampler for one batch of a model with this convention."""
        return cls(steps, precision)

    def bars(self, index: int) -> tuple[Tensor, Tensor]:
        """alpha-bar before and after step ``index``, without dimensions."""
        step = self.steps[index]
        before, after = torch.tensor([step.alpha_bar, step.alpha_bar_next], dtype=self.precision)
        return before, after

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        """x [N, C, H, W] after step ``index``, from the network's estimate for x before it."""
        raise NotImplementedError
