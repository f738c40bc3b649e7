"""DDIM (Song et al. 2020, arXiv 2010.02502)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.samplers.base import Draw, Sampler, register_sampler


@register_sampler("ddim")
class DDIM(Sampler):
    """x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps + sigma z (equation 12).

    a and a' are the alpha-bars before and after the step,
    sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a') (equation 16): eta 0 is deterministic, eta 1 has
    the variance of ancestral sampling.
    """

    takes_eta: ClassVar[bool] = True

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        before, after = self.bars(index)
        variance = (1.0 - after) / (1.0 - before) * (1.0 - before / after).clamp_min(0.0)
        sigma = self.eta * variance**0.5
        direction = (1.0 - after - sigma**2).clamp_min(0.0) ** 0.5
        moved = float(after**0.5) * found.x0 + float(direction) * found.eps
        return moved + float(sigma) * draw() if self.eta else moved
