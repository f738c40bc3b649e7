"""DDIM (Song et al. 2020, arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.samplers import Draw, Sampler
from bidm_cli.sampling.timesteps import Step


class DDIM(Sampler):
    """x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps + sigma z (equation 12).

    a and a' are the alpha-bars before and after the step,
    sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a') (equation 16): eta 0 is deterministic, eta 1 has
    the variance of ancestral sampling.
    """

    def __init__(self, steps: Sequence[Step], eta: float = 0.0) -> None:
        super().__init__(steps)
        self.eta = eta

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        step = self.steps[index]
        before, after = step.alpha_bar, step.alpha_bar_next
        ratio = max(1.0 - before / after, 0.0)
        sigma = self.eta * ((1.0 - after) / (1.0 - before)) ** 0.5 * ratio**0.5
        direction = max(1.0 - after - sigma**2, 0.0) ** 0.5
        moved = after**0.5 * found.x0 + direction * found.eps
        return moved + sigma * draw() if self.eta else moved
