"""What every sampler is: a rule that moves x from one timestep to the next.

    sampler = DDIM(steps)
    for index, step in enumerate(sampler.steps):
        x = sampler.advance(index, x, estimate(...), draw)

One sampler object runs one batch once: multistep methods remember earlier estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.timesteps import Step

Draw = Callable[[], Tensor]
"""Gives this step's fresh Gaussian noise [N, C, H, W]."""


class Sampler:
    """Base of DDIM, Ancestral and DPMSolverPP."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = list(steps)

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        """x [N, C, H, W] after step ``index``, from what the network found in x before it."""
        raise NotImplementedError
