"""Image sets as feature statistics, and the registry of metrics that compare two of them.

    @register_metric("mmd")
    def mmd(samples: SetStatistics, reference: SetStatistics) -> float | None: ...

``bidm report`` shows every registered metric in its text, JSON and page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bidm_cli.data.image_sets import read_image_set
from bidm_cli.errors import BidmError
from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.feature_cache import cached_features
from bidm_cli.report.metrics.image_features import image_features
from bidm_cli.report.metrics.moments import moments
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from bidm_cli.report.metrics.saved import SavedStatistics, has_images, read_saved


@dataclass(frozen=True)
class SetStatistics:
    """Feature statistics of an image set, and their source.

    Attributes:
        count: number of images (of those that ``features`` are of); None for saved statistics without any.
        sha256: of the file, or of decoded pixels in the order of their names (a folder, several archives).
        hashed: "file" or "pixels".
        size: (height, width) of the images, None if they differ or are not known.
        mean, covariance: float64 [D] and [D, D].
        features: float32 [N, D], None for saved statistics without images; large ones are mapped from a file
            and read block by block (:mod:`bidm_cli.report.metrics.moments`).
        spatial: float32 [N, S], spatial features (Inception's alone have some).
        spatial_moments: their mean [S] and covariance [S, S] as saved in the file; None: ``spatial``'s.
        classifier: float32 [classes, D], of the feature network, where it has one.
        settings: of ``bidm sample`` (steps, sampler, eta, seed, ...), from its sample.json.
        sizes: (height, width) of the images, each once, the smallest first.
        is_saved: mean and covariance are as saved in the file, not those of ``features``.
        notes: how the statistics came about. warnings: reasons not to trust them.
        is_cached: features were computed at an earlier call.
    """

    path: Path
    count: int | None
    sha256: str
    hashed: str
    size: tuple[int, int] | None
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    is_saved: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_cached: bool = False
    spatial: np.ndarray | None = None
    spatial_moments: tuple[np.ndarray, np.ndarray] | None = None
    classifier: np.ndarray | None = None

    def settings_text(self) -> str:
        """Settings in one line; empty if they are not known."""
        shown = {key: str(value)[:12] if key == "model" else value for key, value in self.settings.items()}
        return ", ".join(f"{key} {value}" for key, value in shown.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "path": str(self.path),
            "n": self.count,
            "sha256": self.sha256,
            "sha256_of": self.hashed,
            "size": None if self.size is None else list(self.size),
            "saved": self.is_saved,
            "cached": self.is_cached,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Estimate:
    """Value of a metric and its uncertainty.

    Attributes:
        error: standard deviation, in the value's unit.
        method: how ``error`` was found, with the number of images.
        center: mean that ``error`` is around, if that is not the value.
    """

    value: float
    error: float
    method: str
    center: float | None = None

    def to_json(self) -> dict[str, Any]:
        center = {} if self.center is None else {"mean": self.center}
        return {**center, "standard_deviation": self.error, "method": self.method}


Value = float | Estimate
Measure = Callable[[SetStatistics, SetStatistics], Value | tuple[Value, ...] | None]


def number_text(value: float) -> str:
    """Three decimals; small numbers in scientific notation."""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.2e}"


@dataclass(frozen=True)
class Metric:
    """A registered metric: the names of its values, its function, and the format of a value as text.

    Attributes:
        published: names of the values when the features are those that the literature's name stands for.
        features: name of the only feature network that it is defined for; empty: any.
    """

    names: tuple[str, ...]
    measure: Measure
    text: Callable[[float], str]
    published: tuple[str, ...] = ()
    features: str = ""

    def names_for(self, network: FeatureNetwork) -> tuple[str, ...]:
        """Names of the values with the features of ``network``."""
        return self.published if network.published and self.published else self.names


METRICS: list[Metric] = []


def metric_texts() -> dict[str, Callable[[float], str]]:
    """Function that writes a value as text, by the value's name."""
    return {name: metric.text for metric in METRICS for name in metric.names + metric.published}


def register_metric(
    *names: str,
    text: Callable[[float], str] = number_text,
    published: tuple[str, ...] = (),
    features: str = "",
) -> Callable[[Measure], Measure]:
    """Register a function of (samples, reference) that returns one value per name: a tuple in their order (or
    a single value), or None if undefined (saved statistics have no features of single images). A value is a
    number, or an :class:`Estimate` where its uncertainty is known.

    The names are keys of the report's JSON and columns of its table.

    Args:
        published: names in their place with the published Inception weights ("kid", say).
        features: the only feature network that the metric is defined for; default: any.

    Raises:
        ValueError: a name is taken.
    """

    def register(measure: Measure) -> Measure:
        taken = metric_texts().keys() & {*names, *published}
        if taken:
            raise ValueError(f"there is a metric {sorted(taken)[0]!r} already")
        METRICS.append(Metric(names, measure, text, published, features))
        return measure

    return register


def statistics_of(
    path: str | Path,
    network: FeatureNetwork,
    batch_size: int | None = None,
    progress: bool = False,
    cached: bool = False,
) -> SetStatistics:
    """Compute statistics of a folder, zip, tar or ``.npz`` of images; an ``.npz`` may hold them
    (:mod:`bidm_cli.report.metrics.saved`).

    Where it holds both, mean and covariance are those saved (of a whole data set), the features those of the
    images, as guided-diffusion's evaluator has it.

    Pixels are taken as they are stored, whatever their EXIF orientation, as pytorch-fid does.

    Args:
        batch_size: images per pass; default: the network's.
        cached: keep features in the user's cache folder, and take them from it
            (:mod:`bidm_cli.report.metrics.feature_cache`); ``network.weights_sha256`` has to be right.

    Raises:
        BidmError: nothing readable there, fewer than two images, or statistics of another length.
    """
    path = Path(path)
    try:
        saved = read_saved(path, network)
    except BidmError as error:
        if not has_images(path):
            raise
        warning = f"its saved statistics are left out, the distance is to its images ({error})"
        return replace(_computed(path, network, batch_size, progress, cached), warnings=(warning,))
    if saved is None:
        return _computed(path, network, batch_size, progress, cached)
    if saved.features is not None or not has_images(path):
        return _of_saved(path, saved)
    try:
        images = _computed(path, network, batch_size, progress, cached)
    except BidmError as error:
        return replace(_of_saved(path, saved), warnings=(f"no precision and recall: {error}",))
    notes = (*saved.notes, *images.notes, f"all other values are to its {images.count:,} images")
    whole = replace(images, mean=saved.mean, covariance=saved.covariance, spatial_moments=saved.spatial)
    return replace(whole, is_saved=True, notes=notes)


def _of_saved(path: Path, saved: SavedStatistics) -> SetStatistics:
    """Statistics of a file without images."""
    features = saved.features
    return SetStatistics(
        path=path,
        count=None if features is None else len(features),
        sha256=sha256_of(path),
        hashed="file",
        size=None,
        mean=saved.mean,
        covariance=saved.covariance,
        features=features,
        spatial_moments=saved.spatial,
        is_saved=features is None,
        notes=saved.notes,
    )


def _computed(
    path: Path, network: FeatureNetwork, batch_size: int | None, progress: bool, cached: bool
) -> SetStatistics:
    """Statistics of images."""
    images = read_image_set(path, upright=False)
    if len(images) < 2:
        raise BidmError(f"{path} holds one image; a distance between sets needs at least two in each")
    features = (cached_features if cached else image_features)(images, network, batch_size, progress)
    mean, covariance = moments(features.values)
    return SetStatistics(
        path=path,
        count=len(images),
        sha256=features.sha256,
        hashed=features.hashed,
        size=features.sizes[0] if len(features.sizes) == 1 else None,
        mean=mean,
        covariance=covariance,
        features=features.values,
        spatial=features.spatial,
        classifier=network.classifier,
        settings=_settings(path if path.is_dir() else path.parent),
        sizes=features.sizes,
        notes=features.notes,
        is_cached=features.cached,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """Settings in a sample.json beside the images; none without one."""
    try:
        record = json.loads((folder / "sample.json").read_text(encoding="utf-8"))["settings"]
        return {key: value for key, value in record.items() if isinstance(value, (int, float, str, bool))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
