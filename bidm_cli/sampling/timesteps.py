"""Timesteps that a sampler visits, as each family counts them.

    for step in sampling_steps(schedule, convention, 100):   # noisiest first
        step.t, step.alpha_bar, step.alpha_bar_next

The papers leave the choice open and every code base made its own; one step off is enough to miss the
original images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import torch

from bidm_cli.diffusion.convention import SamplingConvention, Spacing
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

Skip = Literal["uniform", "quad"]


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from timestep ``t`` to the next, less noisy one.

    Attributes:
        t: index into the schedule.
        alpha_bar: alpha-bar at ``t``.
        alpha_bar_next: alpha-bar after the step; 1 means no noise is left.
    """

    t: int
    alpha_bar: float
    alpha_bar_next: float


def sampling_steps(
    schedule: NoiseSchedule,
    convention: SamplingConvention,
    steps: int,
    skip: Skip = "uniform",
    chained: bool = False,
) -> list[Step]:
    """Steps of a family's sampler, noisiest first.

    ``ldm`` and ``ddim`` round the stride down, so they may give more steps than asked for:
    ceil(T / (T // steps)). ``skip`` "quad" (these two only) puts timesteps at the squares of an even grid up
    to 0.8 T: more of them where there is little noise. ``chained``: each step ends where the next begins, as
    in diffusers' ancestral sampler and unlike its DDIM.

    Raises:
        BidmError: steps < 1 or > T, a count that the spacing cannot give, or "quad" where it has none.
    """
    timesteps = schedule.timesteps
    if not 1 <= steps <= timesteps:
        raise BidmError(f"{steps} sampling steps asked for; this model takes 1 to {timesteps} (`steps`)")
    if skip == "quad":
        visited = _quad(convention.spacing, timesteps, steps)
    elif skip == "uniform":
        visited = _uniform(convention, timesteps, steps)
    else:
        raise BidmError(f"unknown timestep skip {skip!r}; use uniform or quad")
    alpha_bar = schedule.alphas_cumprod.tolist()
    final = 1.0 if convention.final_alpha == "one" else alpha_bar[0]
    if convention.stride_end and not chained:
        reached = [t - timesteps // steps for t in visited]
        after = [alpha_bar[t] if t >= 0 else final for t in reached]
    else:
        after = [final] + [alpha_bar[t] for t in visited[:-1]]
    return [Step(t, alpha_bar[t], following) for t, following in zip(visited, after, strict=True)][::-1]


def ancestral_convention(convention: SamplingConvention) -> SamplingConvention:
    """``convention`` as the family's ancestral sampler counts: down to t = 0, and no noise left after it.

    LDM's ancestral loop has none of the + 1 of its DDIM, and OpenAI's takes the fractional stride.
    """
    others: dict[Spacing, Spacing] = {"ldm": "ddim", "openai_ddim": "openai"}
    spacing = others.get(convention.spacing, convention.spacing)
    return replace(convention, spacing=spacing, final_alpha="one")


def _uniform(convention: SamplingConvention, timesteps: int, steps: int) -> list[int]:
    strided = range(0, timesteps, timesteps // steps)
    match convention.spacing:
        case "ddim":
            return list(strided)
        case "ldm":
            return _clamp([t + 1 for t in strided], timesteps)
        case "leading":
            return _clamp(
                [i * (timesteps // steps) + convention.steps_offset for i in range(steps)], timesteps
            )
        case "openai_ddim":
            return _openai_ddim(timesteps, steps)
        case "openai":
            stride = (timesteps - 1) / (steps - 1) if steps > 1 else 1.0
            # Summed up, not multiplied: the rounding has to match the original's.
            return [round(at) for at in accumulate([0.0] + [stride] * (steps - 1))]
        case "lucidrains":
            # In float32 and rounded towards 0, as the original does.
            grid = torch.linspace(-1, timesteps - 1, steps + 1, dtype=torch.float32)
            return [int(t) for t in grid[1:].tolist()]
        case "linspace":
            return [int(t) for t in np.linspace(0, timesteps - 1, steps).round()]
        case "trailing":
            return [int(t) - 1 for t in np.round(np.arange(timesteps, 0, -timesteps / steps))][::-1]


def _openai_ddim(timesteps: int, steps: int) -> list[int]:
    possible = {len(range(0, timesteps, stride)): stride for stride in range(timesteps, 0, -1)}
    if steps not in possible:
        nearest = sorted(possible, key=lambda count: (abs(count - steps), count))[:2]
        raise BidmError(
            f"no whole stride through {timesteps} timesteps gives exactly {steps} steps; "
            f"try `steps` {' or '.join(str(count) for count in sorted(nearest))}"
        )
    return list(range(0, timesteps, possible[steps]))


def _quad(spacing: str, timesteps: int, steps: int) -> list[int]:
    if spacing not in ("ldm", "ddim"):
        raise BidmError(f"this model's family ({spacing} spacing) has no quad timesteps; use `skip` uniform")
    squares = np.linspace(0, np.sqrt(timesteps * 0.8), steps) ** 2
    return _clamp([int(t) + (spacing == "ldm") for t in squares], timesteps)


def _clamp(indices: list[int], timesteps: int) -> list[int]:
    """No index past the schedule, and none twice: a repeated timestep changes nothing and costs a step."""
    return sorted({min(t, timesteps - 1) for t in indices})
