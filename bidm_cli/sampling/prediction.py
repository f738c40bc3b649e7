"""What a network's output says about the image and the noise in x_t.

With alpha-bar a, x_t = sqrt(a) x0 + sqrt(1 - a) eps. The network predicts eps, x0, or
v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans and Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "x0", "v"]
Clip = Literal["none", "keep_eps", "rederive"]


@dataclass(frozen=True)
class Estimate:
    """The image and the noise that a network sees in x_t, both [N, C, H, W].

    ``variance`` is the second half of the output of a network that learned its variance, else None.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


def estimate(
    prediction: Prediction, x: Tensor, output: Tensor, alpha_bar: float | Tensor, clip: Clip = "none"
) -> Estimate:
    """Read ``output`` [N, C or 2C, H, W] for ``x`` [N, C, H, W] at alpha-bar ``alpha_bar``.

    ``clip`` limits x0 to [-1, 1]; "rederive" then takes the noise from the clipped x0, "keep_eps" leaves
    the noise as it was. ``alpha_bar`` is one number (coefficients are then float64), or [N, 1, 1, 1].
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
        x0 = x0.clamp(-1.0, 1.0)
    if clip == "rederive":
        eps = noise_from_x0(x, x0, alpha_bar)
    return Estimate(x0, eps, variance)


def noise_from_x0(x: Tensor, x0: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """eps = (x_t - sqrt(a) x0) / sqrt(1 - a)."""
    return (x - alpha_bar**0.5 * x0) / (1.0 - alpha_bar) ** 0.5
