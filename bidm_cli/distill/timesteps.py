"""Timesteps that a network is distilled at."""

from __future__ import annotations

import torch
from torch import Tensor


def training_timesteps(n: int, timesteps: int, power: float, generator: torch.Generator) -> Tensor:
    """t = floor(T u^power) for uniform u, indices [n] into a schedule of T = ``timesteps``.

    1 is uniform. Above 1, low noise is seen more often: the share of t below f T is f^(1 / power), so that 2
    puts 45 % of a batch into the least noisy fifth, where binary networks err most. Found here, not in a
    paper; benchmarks/results/ablation.md.
    """
    if power == 1:
        return torch.randint(timesteps, (n,), generator=generator)
    t = torch.rand(n, generator=generator, dtype=torch.float64).pow(power) * timesteps
    return t.long().clamp(max=timesteps - 1)
