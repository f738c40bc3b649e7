"""Stand-in models: one whose exact solution is known, one small real network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.ddpm_unet import DDPMUNet

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"


class GaussianDenoiser(nn.Module):
    """The perfect network for data ~ N(mean, deviation^2), every pixel on its own."""

    def __init__(self, schedule: NoiseSchedule, mean: float, deviation: float, prediction: str) -> None:
        super().__init__()
        self.register_buffer("alpha_bar", schedule.alphas_cumprod)
        self.mean, self.deviation, self.prediction = mean, deviation, prediction

    def forward(self, x: Tensor, t: Tensor, context: Any = None, y: Any = None) -> Tensor:
        a = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        variance = self.deviation**2
        gain = a.sqrt() * variance / (a * variance + 1 - a)
        x0 = self.mean + gain * (x.double() - a.sqrt() * self.mean)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        found = {"epsilon": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}
        return found[self.prediction].float()

    def solution(self, x: Tensor, before: float, after: float) -> Tensor:
        """Where the probability-flow ODE takes x from alpha-bar ``before`` to ``after``."""
        variance = self.deviation**2
        spread = ((after * variance + 1 - after) / (before * variance + 1 - before)) ** 0.5
        return after**0.5 * self.mean + spread * (x.double() - before**0.5 * self.mean)


@pytest.fixture
def gaussian() -> Callable[..., DiffusionModel]:
    """gaussian(mean=, deviation=, prediction=, **convention) -> a model of that data, 1x8x8."""

    def build(
        mean: float = 0.4, deviation: float = 0.3, prediction: str = "epsilon", **convention: Any
    ) -> DiffusionModel:
        schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
        network = GaussianDenoiser(schedule, mean, deviation, prediction)
        shape, habits = (1, 8, 8), SamplingConvention(**convention)
        return DiffusionModel("ddpm", network, shape, schedule, habits, {}, prediction=prediction)

    return build


@pytest.fixture
def small() -> DiffusionModel:
    """A DDPM U-Net with random weights for 1x8x8, 40 timesteps."""
    torch.manual_seed(0)
    network = DDPMUNet(
        in_channels=1, out_channels=1, ch=32, ch_mult=[1, 2], num_res_blocks=1, attention_levels=[1]
    ).eval()
    schedule = NoiseSchedule.linear(40, 1e-3, 0.2)
    return DiffusionModel("ddpm", network, (1, 8, 8), schedule, SamplingConvention(), {})


@pytest.fixture
def reference() -> Callable[[str], dict[str, np.ndarray]]:
    """reference("dit") -> the arrays of that checkpoint's ref.npz; skips where ../shared is absent."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = SHARED / name / "ref.npz"
        if not path.exists():
            pytest.skip(f"{path} is absent")
        with np.load(path) as arrays:
            return dict(arrays)

    return load
