"""Frechet distance of spatial features; sFID with the published Inception features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bidm_cli.report.metrics.base import SetStatistics, register_metric
from bidm_cli.report.metrics.frechet import frechet_distance
from bidm_cli.report.metrics.moments import moments


@register_metric("spatial_fd", published=("sfid",), features="inception")
def spatial_distance(samples: SetStatistics, reference: SetStatistics) -> float | None:
    """Frechet distance of the first 7 maps of Inception's mixed_6 (Nash et al. 2021, arXiv 2103.03841), as in
    guided-diffusion's evaluations/evaluator.py; None without images."""
    if samples.spatial is None or reference.spatial is None:
        return None
    return frechet_distance(_spatial(samples, samples.spatial), _spatial(reference, reference.spatial))


def _spatial(one: SetStatistics, features: np.ndarray) -> SetStatistics:
    mean, covariance = moments(features)
    return replace(one, features=features, mean=mean, covariance=covariance, is_saved=False)
