"""Timesteps that a network is distilled at."""

from __future__ import annotations

import torch
from torch import Tensor


def training_timesteps(n: int, timesteps: int, power: float, generator: torch.Generator) -> Tensor:
    """t = floor(T (1 - u^(1 / power))) for uniform u, indices [n] into a schedule of T = ``timesteps``.

    The density is power (1 - t / T)^(power - 1): 1 is uniform; above 1, low noise is seen more often. 3 puts
    49 % of the examples into the least noisy fifth, where binary networks err most, and 6 % into the noisiest
    two fifths. Found here, not in a paper; benchmarks/results/ablation.md.
    """
    if power == 1:
        return torch.randint(timesteps, (n,), generator=generator)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return ((1 - u.pow(1 / power)) * timesteps).long().clamp(0, timesteps - 1)
