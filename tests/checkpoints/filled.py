"""Weights and inputs that any library can make again: sines of the numbers' places, no random generator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def filled(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict for these shapes; norms have weights about 1, layers about what they begin with."""
    found = {}
    for k, name in enumerate(sorted(shapes)):
        wave = waves(shapes[name], k)
        if len(shapes[name]) > 1:
            fan_in = math.prod(shapes[name][1:])
            wave = wave * (1.5 / fan_in) ** 0.5 if "embedding.weight" not in name else wave * 0.5
        elif name.endswith("weight"):
            wave = 1 + 0.3 * wave
        else:
            wave = 0.2 * wave
        found[name] = wave.float()
    return found


def waves(shape: Sequence[int], k: float) -> Tensor:
    """sin(0.7391 i^1.01 + k) at place i, float64."""
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7391 * places**1.01 + k).reshape(*shape)


def probe(values: Tensor) -> dict[str, Any]:
    """A result in short: shape, largest magnitude, and 8 values spread over it."""
    flat = values.detach().double().flatten()
    places = torch.linspace(0, len(flat) - 1, 8, dtype=torch.float64).long()
    picked = [float(f"{number:.7g}") for number in flat[places].tolist()]
    return {"shape": list(values.shape), "largest": float(f"{flat.abs().max():.7g}"), "values": picked}
