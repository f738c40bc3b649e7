"""Ancestral sampling (DDPM, Ho et al. 2020, arXiv 2006.11239) on all timesteps or a subsequence of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bidm_cli.errors import BidmError
from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.samplers.base import Draw, Sampler, register_sampler

_SMALLEST = 1e-20
"""A step without noise after it has a posterior variance of 0, whose logarithm is to be finite."""


@register_sampler("ddpm")
class Ancestral(Sampler):
    """x' = mean of the posterior q(x' | x, x0) (DDPM, equations 6 and 7) + standard deviation * z.

    With alpha-bars a (before) and a' (after), beta = 1 - a / a':
    mean = sqrt(a') beta / (1 - a) x0 + sqrt(a / a') (1 - a') / (1 - a) x. The variance is

    * ``small``: the posterior's, beta (1 - a') / (1 - a);
    * ``large`` and ``ddim_noisy``: beta. The originals differ only in the last step's value, which no
      image sees: the last step adds no noise;
    * ``learned_range``: exp(f log beta + (1 - f) log posterior), f = (v + 1) / 2 from the network's second
      half v (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 15);
    * ``learned``: v itself.

    With the convention's ``noise_at_end`` the last step adds noise, too, unless it comes from t = 0.
    """

    ancestral: ClassVar[bool] = True

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        before, after = self.bars(index)
        alpha = before / after
        beta = 1.0 - alpha
        of_x0 = after**0.5 * beta / (1.0 - before)
        of_x = alpha**0.5 * (1.0 - after) / (1.0 - before)
        mean = float(of_x0) * found.x0 + float(of_x) * x
        noise = draw()
        if index == len(self.steps) - 1 and not (self.convention.noise_at_end and self.steps[index].t > 0):
            return mean
        posterior = (1.0 - after) / (1.0 - before) * beta
        return mean + self._deviation(beta, posterior, found.variance) * noise

    def _deviation(self, beta: Tensor, posterior: Tensor, learned: Tensor | None) -> float | Tensor:
        kind = self.convention.variance
        if kind in ("small", "large", "ddim_noisy"):
            return float((posterior if kind == "small" else beta) ** 0.5)
        if learned is None:
            raise BidmError("this model's convention takes the variance from the network, which gives none")
        if kind == "learned":
            return learned.clamp_min(0.0).sqrt()
        fraction = (learned + 1.0) / 2.0
        ends = float(beta.log()), float(posterior.clamp_min(_SMALLEST).log())
        return torch.exp(0.5 * (fraction * ends[0] + (1.0 - fraction) * ends[1]))
