"""Ancestral sampling (DDPM, Ho et al. 2020, arXiv 2006.11239) on all timesteps or a subsequence of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.errors import BidmError
from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.samplers.base import Draw, Sampler, register_sampler
from bidm_cli.sampling.timesteps import Step

Variance = Literal["small", "large", "ddim_noisy", "learned_range", "learned"]
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

    ``noise_at_end``: the last step adds noise, too, unless it comes from t = 0 (diffusers).
    """

    ancestral: ClassVar[bool] = True

    def __init__(
        self,
        steps: Sequence[Step],
        variance: Variance,
        noise_at_end: bool = False,
        precision: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(steps, precision)
        self.variance, self.noise_at_end = variance, noise_at_end

    @classmethod
    def create(
        cls, steps: Sequence[Step], convention: SamplingConvention, eta: float, precision: torch.dtype
    ) -> Ancestral:
        return cls(steps, convention.variance, convention.noise_at_end, precision)

    def advance(self, index: int, x: Tensor, found: Estimate, draw: Draw) -> Tensor:
        before, after = self.bars(index)
        alpha = before / after
        beta = 1.0 - alpha
        of_x0 = after**0.5 * beta / (1.0 - before)
        of_x = alpha**0.5 * (1.0 - after) / (1.0 - before)
        mean = float(of_x0) * found.x0 + float(of_x) * x
        noise = draw()
        if index == len(self.steps) - 1 and not (self.noise_at_end and self.steps[index].t > 0):
            return mean
        posterior = (1.0 - after) / (1.0 - before) * beta
        return mean + self._deviation(beta, posterior, found.variance) * noise

    def _deviation(self, beta: Tensor, posterior: Tensor, learned: Tensor | None) -> float | Tensor:
        if self.variance == "small":
            return float(posterior**0.5)
        if self.variance not in ("learned_range", "learned"):
            return float(beta**0.5)
        if learned is None:
            raise BidmError("this model's convention takes the variance from the network, which gives none")
        if self.variance == "learned":
            return learned.clamp_min(0.0).sqrt()
        fraction = (learned + 1.0) / 2.0
        ends = float(beta.log()), float(posterior.clamp_min(_SMALLEST).log())
        return torch.exp(0.5 * (fraction * ends[0] + (1.0 - fraction) * ends[1]))
