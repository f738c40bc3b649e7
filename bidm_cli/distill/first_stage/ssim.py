"""Structural similarity of images (Wang et al. 2004, IEEE TIP 13(4)), with its authors' constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of images a and b [N, C, H, W] in [0, 1]; 1 for the same ones.

    Of each channel alone, with a Gaussian window that stays inside the image; on images smaller than that the
    window is as large as fits.
    """
    a, b = (images.double().flatten(0, 1)[:, None] for images in (a, b))
    size = min(WINDOW, *a.shape[2:])
    places = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    line = torch.exp(-places.square() / (2 * SIGMA**2))
    window = (line[:, None] * line)[None, None] / line.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean())
