"""What every sampler is: a rule that moves x from one timestep to the next.

    sampler = DDIM(steps)
    for index, step in enumerate(sampler.steps):
        x = sampler.advance(index, x, estimate(...), draw)

One sampler object runs one batch once: multistep methods remember earlier estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.timesteps import Step

Draw = Callable[[], Tensor]
"""Gives this step's fresh Gaussian noise [N, C, H, W]."""


class Sampler:
    """Base of DDIM, Ancestral and DPMSolverPP.

    ``precision``: of the coefficients; diffusers works in float32, which shows where they are differences.
    """

    def __init__(self, steps: Sequence[Step], precision: torch.dtype = torch.float64) -> None:
        self.steps, self.precision = list(steps), precision

    def bars(self, index: int) -> tuple[Tensor, Tensor]:
        """alpha-bar before and after step ``index``, without dimensions."""
        step = self.steps[index]
        before, after = torch.tensor([step.alpha_bar, step.alpha_bar_next], dtype=self.precision)
        return before, after

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        """x [N, C, H, W] after step ``index``, from what the network found in x before it."""
        raise NotImplementedError
