"""Kernel distance between two feature distributions; KID with the published Inception features."""

from __future__ import annotations

import numpy as np

from bidm_cli.report.metrics.base import Estimate, SetStatistics, register_metric
from bidm_cli.report.metrics.moments import chosen_rows

SUBSETS, SUBSET_SIZE = 100, 1000
SEED = 2020
"""Of torch-fidelity's subsets, so that the values are equal to its."""
DRAWS, LARGEST_DRAW = 100, 2000


@register_metric("kernel_distance", text=lambda value: f"{value:.5f}", published=("kid",))
def of_sets(samples: SetStatistics, reference: SetStatistics) -> Estimate | None:
    """:func:`kernel_distance`; None for saved statistics, which have no features."""
    if samples.features is None or reference.features is None:
        return None
    return kernel_distance(samples.features, reference.features)


def kernel_distance(samples: np.ndarray, reference: np.ndarray) -> Estimate:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401, eq. 4).

    The mean over 100 pairs of random subsets of 1,000 images; all images at once of sets of up to 1,000 of
    equal length. The bootstrap draws images with replacement out of up to 2,000 evenly spaced ones of either
    set and is brought to the number of images with 1 / sqrt(n).
    """
    size = min(SUBSET_SIZE, len(samples), len(reference))
    whole = size == len(samples) == len(reference)
    random = np.random.RandomState(SEED)
    found = []
    for _ in range(1 if whole else SUBSETS):
        pair = [
            chosen_rows(one, random.choice(len(one), size, replace=False)) for one in (samples, reference)
        ]
        found.append(_squared_mmd(*_kernels(*pair), *np.ones((2, 1, size)))[0])
    return Estimate(float(np.mean(found)), _bootstrap_error(samples, reference), _method(samples, reference))


def _bootstrap_error(samples: np.ndarray, reference: np.ndarray) -> float:
    """Standard deviation of the distance over draws, at the number of images that there are."""
    counts = [min(LARGEST_DRAW, len(one)) for one in (samples, reference)]
    parts = [
        chosen_rows(one, np.linspace(0, len(one) - 1, count).astype(np.int64))
        for one, count in zip((samples, reference), counts, strict=True)
    ]
    random = np.random.default_rng(0)
    weights = [random.multinomial(count, np.full(count, 1 / count), DRAWS).astype(float) for count in counts]
    spread = np.nanstd(_squared_mmd(*_kernels(*parts), *weights), ddof=1)
    return float(spread * np.sqrt(min(counts) / min(len(samples), len(reference))))


def _method(samples: np.ndarray, reference: np.ndarray) -> str:
    counts = " and ".join(f"{min(LARGEST_DRAW, len(one)):,}" for one in (samples, reference))
    scaled = max(len(samples), len(reference)) > LARGEST_DRAW
    return f"bootstrap, {DRAWS} draws of {counts} images" + (", times 1 / sqrt(n)" if scaled else "")


def _kernels(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernel matrices of x with x, y with y (their diagonals 0, of an image with itself) and x with y."""
    xx, yy, xy = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    return xx, yy, xy


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    base = (a @ b.T).astype(np.float64) / a.shape[1] + 1
    return base * base * base  # many times faster than a power


def _squared_mmd(
    xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, wx: np.ndarray, wy: np.ndarray
) -> np.ndarray:
    """Unbiased squared MMD [draws], with how often each image counts, [draws, N] and [draws, M]."""

    def within(kernel: np.ndarray, w: np.ndarray) -> np.ndarray:
        pairs = w.sum(axis=1) ** 2 - (w**2).sum(axis=1)
        pairs[pairs == 0] = np.nan  # one image, drawn every time
        return np.einsum("dn,dn->d", w @ kernel, w) / pairs

    across = np.einsum("dm,dm->d", wx @ xy, wy) / (wx.sum(axis=1) * wy.sum(axis=1))
    return within(xx, wx) + within(yy, wy) - 2 * across
