"""Estimates of the image and the noise in x_t from a network's output.

With alpha-bar a, x_t = sqrt(a) x0 + sqrt(1 - a) eps. The network predicts eps, x0, or
v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans and Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bidm_cli.diffusion.convention import SamplingConvention

Prediction = Literal["epsilon", "x0", "v"]
Clip = Literal["none", "keep_eps", "rederive"]


@dataclass(frozen=True)
class Estimate:
    """Image and noise that a network sees in x_t, [N, C, H, W], and the variance if it learned that."""

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


@dataclass(frozen=True)
class Clipping:
    """Range that x0 is clipped to; attributes as the settings of :class:`SamplingConvention`."""

    clip_range: float = 1.0
    threshold_quantile: float | None = None
    threshold_max: float = 1.0

    @classmethod
    def of(cls, convention: SamplingConvention) -> Clipping:
        return cls(convention.clip_range, convention.threshold_quantile, convention.threshold_max)

    def clip(self, x0: Tensor) -> Tensor:
        """x0 [N, C, H, W] within the limits."""
        if self.threshold_quantile is None:
            return x0.clamp(-self.clip_range, self.clip_range)
        sizes = x0.abs().flatten(1).float()
        # One image at a time: torch's quantile takes at most 2^24 numbers.
        quantiles = torch.stack([row.quantile(self.threshold_quantile) for row in sizes])
        limit = quantiles.clamp(1.0, self.threshold_max).to(x0.dtype).reshape(-1, 1, 1, 1)
        return x0.clamp(-limit, limit) / limit


def estimate(
    prediction: Prediction,
    x: Tensor,
    output: Tensor,
    alpha_bar: float | Tensor,
    clip: Clip = "none",
    clipping: Clipping = Clipping(),
) -> Estimate:
    """Read ``output`` [N, C or 2C, H, W] for ``x`` [N, C, H, W].

    ``clip`` keeps x0 within ``clipping``; "rederive" then takes the noise from the clipped x0, "keep_eps"
    leaves the noise as it was. ``alpha_bar`` is one number (coefficients are then float64), or [N, 1, 1, 1].
    """
    channels = x.shape[1]
    variance = output[:, channels:] if output.shape[1] == 2 * channels else None
    output = output[:, :channels]
    signal, noise = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    if prediction == "epsilon":
        x0, eps = (x - noise * output) / signal, output
    elif prediction == "x0":
        x0, eps = output, noise_from_x0(x, output, alpha_bar)
    else:
        x0, eps = signal * x - noise * output, signal * output + noise * x
    if clip != "none":
        x0 = clipping.clip(x0)
    if clip == "rederive":
        eps = noise_from_x0(x, x0, alpha_bar)
    return Estimate(x0, eps, variance)


def converted(
    output: Tensor, x: Tensor, alpha_bar: float | Tensor, prediction: Prediction, wanted: Prediction
) -> Tensor:
    """An output [N, C, H, W] for x [N, C, H, W] in the terms of another prediction.

    From the noise it divides by alpha, from x0 by sigma; between v and any other it never does.
    """
    if prediction == wanted:
        return output
    seen, signal, noise = estimate(prediction, x, output, alpha_bar), alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    if wanted == "epsilon":
        return seen.eps
    return seen.x0 if wanted == "x0" else signal * seen.eps - noise * seen.x0


def noise_from_x0(x: Tensor, x0: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """eps = (x_t - sqrt(a) x0) / sqrt(1 - a)."""
    return (x - alpha_bar**0.5 * x0) / (1.0 - alpha_bar) ** 0.5
