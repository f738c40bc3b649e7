"""Structural similarity against a computation of its own, with scipy's filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from bidm_cli.distill.first_stage.ssim import ssim


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Of one channel [H, W] in [0, 1], window 11, only where it lies inside."""
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, window, axis=0), window, axis=1)[5:-5, 5:-5]

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))


@pytest.mark.parametrize("noise", [0.01, 0.2, 1.0])
def test_similarity_is_that_of_its_definition(noise):
    generator = np.random.default_rng(0)
    a = np.cumsum(generator.standard_normal((2, 3, 20, 27)), axis=3) / 10
    b = a + noise * generator.standard_normal(a.shape)
    expected = np.mean(
        [by_scipy(x, y) for x, y in zip(a.reshape(6, 20, 27), b.reshape(6, 20, 27), strict=True)]
    )
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-9)


def test_the_same_images_are_1_and_opposite_ones_are_below_0():
    images = torch.rand(1, 3, 8, 8)
    assert ssim(images, images) == pytest.approx(1)
    assert ssim(images, 1 - images) < 0
