"""Frechet distance between two feature distributions; FID with the published Inception features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bidm_cli.errors import BidmError
from bidm_cli.report.metrics.base import Estimate, SetStatistics, register_metric
from bidm_cli.report.metrics.moments import chosen_rows, moments

SUBSETS = 5
"""Disjoint subsets of the samples, every fifth image in each, whose distances show the spread."""


@register_metric("value")  # its key in report files; what it may be called depends on the features
def with_spread(samples: SetStatistics, reference: SetStatistics) -> float | Estimate:
    """:func:`frechet_distance`, and mean and standard deviation over disjoint subsets of the samples.

    Subsets have fewer images, which raises the distance: their mean is above the value.
    """
    value = frechet_distance(samples, reference)
    features = samples.features
    if features is None or samples.is_saved or len(features) < 2 * SUBSETS:
        return value
    count, factor = len(features) // SUBSETS, _factor(reference)
    distances = []
    for start in range(SUBSETS):
        part = chosen_rows(features, np.arange(start, count * SUBSETS, SUBSETS))
        mean, covariance = moments(part)
        subset = replace(samples, features=part, mean=mean, covariance=covariance)
        distances.append(_distance(subset, reference, _factor(subset), factor))
    method = f"{SUBSETS} disjoint subsets of {count:,} samples each, against the whole reference"
    return Estimate(value, float(np.std(distances, ddof=1)), method, float(np.mean(distances)))


def frechet_distance(samples: SetStatistics, reference: SetStatistics) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    The trace of the root is the nuclear norm of F1 F2^T with F^T F = C: real, and finite for singular
    covariances, for which a general matrix square root fails. F comes from the centered features if there are
    fewer than D (quick), else from a symmetric eigendecomposition.

    Raises:
        BidmError: shapes that differ, or numbers that are not finite.
    """
    _check(samples, reference)
    return _distance(samples, reference, _factor(samples), _factor(reference))


def _distance(samples: SetStatistics, reference: SetStatistics, a: np.ndarray, b: np.ndarray) -> float:
    """Distance with the factors ``a`` and ``b`` of the covariances."""
    difference = samples.mean - reference.mean
    traces = np.trace(samples.covariance) + np.trace(reference.covariance)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(float(difference @ difference + traces - 2 * float(root)), 0.0)


def _check(samples: SetStatistics, reference: SetStatistics) -> None:
    if samples.mean.shape != reference.mean.shape or samples.covariance.shape != reference.covariance.shape:
        raise BidmError(
            f"the two sets have {samples.mean.shape[0]} and {reference.mean.shape[0]} features; "
            "statistics of another feature network cannot be compared"
        )
    if not all(np.isfinite(a).all() for one in (samples, reference) for a in (one.mean, one.covariance)):
        raise BidmError("the features or saved statistics hold numbers that are not finite")


def _factor(statistics: SetStatistics) -> np.ndarray:
    """F [R, D] with F^T F = C."""
    features = statistics.features
    if features is not None and not statistics.is_saved and len(features) < features.shape[1]:
        return (features - statistics.mean) / np.sqrt(len(features) - 1)
    covariance = statistics.covariance
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # Eigenvalues below zero are rounding noise.
    return np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
