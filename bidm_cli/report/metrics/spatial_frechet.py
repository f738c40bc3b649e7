"""Frechet distance of spatial features; sFID with the published Inception features."""

from __future__ import annotations

from dataclasses import replace

from bidm_cli.report.metrics.base import SetStatistics, register_metric
from bidm_cli.report.metrics.frechet import frechet_distance
from bidm_cli.report.metrics.moments import moments


@register_metric("spatial_fd", published=("sfid",), features="inception")
def spatial_distance(samples: SetStatistics, reference: SetStatistics) -> float | None:
    """Frechet distance of the first 7 maps of Inception's mixed_6 (Nash et al. 2021, arXiv 2103.03841).

    None without images, unless the file holds these statistics (guided-diffusion's reference batches).

    Read beside guided-diffusion's evaluations/evaluator.py: the tensor (``mixed_6/conv:0``, which
    torch-fidelity's convert_inception_weights.py maps to Mixed_6d.branch1x1), the channels (``[..., :7]``),
    the order of the 2,023 features (channels last), ``mu_s`` and ``sigma_s`` before the images' own. The
    evaluator resizes as TensorFlow does, pytorch-fid's network as torch does. TensorFlow's graph was not run.
    """
    pair = [_spatial(one) for one in (samples, reference)]
    return None if pair[0] is None or pair[1] is None else frechet_distance(pair[0], pair[1])


def _spatial(one: SetStatistics) -> SetStatistics | None:
    """Statistics of the spatial features in the place of the others."""
    if one.spatial_moments is not None:
        mean, covariance = one.spatial_moments
        return replace(one, mean=mean, covariance=covariance, is_saved=True)
    if one.spatial is None:
        return None
    mean, covariance = moments(one.spatial)
    return replace(one, features=one.spatial, mean=mean, covariance=covariance, is_saved=False)
