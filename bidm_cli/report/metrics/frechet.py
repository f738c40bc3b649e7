"""Frechet distance between two feature distributions; FID with the published Inception features."""

from __future__ import annotations

import numpy as np

from bidm_cli.errors import BidmError
from bidm_cli.report.metrics.base import SetStatistics, register_metric


@register_metric("value")  # its key in report files; what it may be called depends on the features
def frechet_distance(samples: SetStatistics, reference: SetStatistics) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    The trace of the root is the nuclear norm of F1 F2^T with F^T F = C: real, and finite for singular
    covariances, for which a general matrix square root fails. F comes from the centered features if there are
    fewer than D (quick), else from a symmetric eigendecomposition.

    Raises:
        BidmError: shapes that differ, or numbers that are not finite.
    """
    _check(samples, reference)
    difference = samples.mean - reference.mean
    traces = np.trace(samples.covariance) + np.trace(reference.covariance)
    root = np.linalg.svd(_factor(samples) @ _factor(reference).T, compute_uv=False).sum()
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
