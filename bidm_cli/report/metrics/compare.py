"""Comparison of two image sets by every registered metric.

network = load_features("inception")
score = compare(statistics_of("samples/", network), statistics_of("bedrooms.npz", network), network)
score.metric, score.value, score.warnings
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Importing a metric's module registers it, in the order of the report's columns.
from bidm_cli.report.metrics import (  # noqa: F401
    frechet,
    inception_score,
    kernel_distance,
    precision_recall,
    spatial_frechet,
)
from bidm_cli.report.metrics.base import METRICS, Estimate, SetStatistics
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from bidm_cli.report.metrics.networks.inception import PUBLISHED_SHA256

MIN_IMAGES = 2048
"""Below this many images the covariance of 2,048 Inception features is singular and FID is biased upwards."""
_BIASED = f"below {MIN_IMAGES:,} the distance is biased upwards and must not be compared with published ones"


@dataclass(frozen=True)
class Score:
    """Values of all metrics for a set of samples, with everything that they must be quoted with.

    Attributes:
        values: by registered name ("value" is the Frechet distance); None if a metric is not defined.
        estimates: of the values whose uncertainty is known.
        warnings: reasons not to trust the values.
    """

    values: dict[str, float | None]
    samples: SetStatistics
    reference: SetStatistics
    network: FeatureNetwork
    warnings: list[str] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """Name of the Frechet distance: "FID" only with the weights that define it, else "FD (...)"."""
        return self.network.metric

    @property
    def value(self) -> float | None:
        """The Frechet distance."""
        return self.values["value"]

    def to_json(self) -> dict[str, Any]:
        fid = {"fid": self.value} if self.network.published else {}
        return {
            "metric": self.metric,
            **fid,
            **self.values,
            "uncertainty": {name: estimate.to_json() for name, estimate in self.estimates.items()},
            "features": self.network.name,
            "weights_sha256": self.network.weights_sha256,
            "published_weights": self.network.published,
            "resize": self.network.resize,
            "samples": self.samples.to_json(),
            "reference": self.reference.to_json(),
            "warnings": self.warnings,
        }


def compare(samples: SetStatistics, reference: SetStatistics, network: FeatureNetwork) -> Score:
    """Compute every registered metric.

    Raises:
        BidmError: as :func:`bidm_cli.report.metrics.frechet.frechet_distance`.
    """
    found: dict[str, float | Estimate | None] = {}
    for metric in METRICS:
        if metric.features in ("", network.name):
            measured = metric.measure(samples, reference)
            each = measured if isinstance(measured, tuple) else (measured,) * len(metric.names)
            found.update(zip(metric.names_for(network), each, strict=True))
    estimates = {name: one for name, one in found.items() if isinstance(one, Estimate)}
    values = {name: one.value if isinstance(one, Estimate) else one for name, one in found.items()}
    return Score(values, samples, reference, network, _warnings(samples, reference, network), estimates)


def _warnings(samples: SetStatistics, reference: SetStatistics, network: FeatureNetwork) -> list[str]:
    warnings = [
        warning
        for role, one in (("samples", samples), ("reference", reference))
        for warning in _warnings_on(role, one)
    ]
    if samples.size and reference.size and samples.size != reference.size:
        warnings.append(f"the samples are {samples.size} pixels, the reference {reference.size}")
    if network.name == "inception" and not network.published:
        warnings.append(f"these are not the weights that define FID (SHA-256 {PUBLISHED_SHA256}...)")
    return warnings


def _warnings_on(role: str, one: SetStatistics) -> list[str]:
    """Reasons not to trust one of the two sets: few images, or images of several sizes."""
    warnings = [f"{one.path}: {warning}" for warning in one.warnings]
    if one.count is not None and one.count < MIN_IMAGES:
        what = "precision and recall are rough with so few" if one.is_saved else _BIASED
        warnings.append(f"only {one.count:,} images in the {role}: {what}")
    if len(one.sizes) > 1:
        least, most = (f"{height}x{width}" for height, width in (one.sizes[0], one.sizes[-1]))
        warnings.append(
            f"the {role} hold images of {len(one.sizes):,} sizes, {least} to {most}: each is resized on its "
            "own to the feature network's input, whatever its proportions; bring them all to one size first"
        )
    return warnings
