"""Frechet distance (FID with pytorch-fid's Inception), precision and recall between two image sets.

network = load_features("inception")
reference = statistics_of("bedrooms.npz", network)
score = compare(statistics_of("samples/", network), reference, network)
score.metric, score.value, score.warnings
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bidm_cli.data.image_sets import (
    ImageSet,
    load_npz_array,
    npz_keys,
    read_image_set,
    to_channels,
)
from bidm_cli.errors import BidmError
from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.features import PUBLISHED_SHA256, FeatureNetwork

MIN_IMAGES = 2048
"""Below this many images the covariance of 2,048 Inception features is singular and FID is biased upwards."""
_NEIGHBOURS = 3
_MAX_NEIGHBOURHOOD = 10_000


@dataclass(frozen=True)
class SetStatistics:
    """Features of an image set, and what they were computed from.

    Attributes:
        path: where the images (or the saved statistics) are.
        count: how many images; None for saved statistics, which do not say.
        sha256: of the file, or of a folder's decoded pixels in the order of their names.
        hashed: "file" or "pixels".
        size: (height, width) of the images, None if they differ or are not known.
        mean, covariance: float64 [D] and [D, D].
        features: float32 [N, D], None for saved statistics.
        settings: how ``bidm sample`` drew them (steps, sampler, eta, seed, ...), from its sample.json.
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

    def settings_text(self) -> str:
        """The settings in one line; empty if they are not known."""
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
        }


@dataclass(frozen=True)
class Score:
    """A Frechet distance with everything it must be quoted with.

    Attributes:
        metric: "FID" only with the weights that define it, else "FD (...)".
        value: the distance.
        precision, recall: of the same features with 3 neighbours (arXiv 1904.06991); None without images.
        warnings: why not to trust the value.
    """

    metric: str
    value: float
    samples: SetStatistics
    reference: SetStatistics
    network: FeatureNetwork
    precision: float | None = None
    recall: float | None = None
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"metric": self.metric, "value": self.value}
        if self.network.name == "inception":
            shown["fid"] = self.value
        return shown | {
            "precision": self.precision,
            "recall": self.recall,
            "features": self.network.name,
            "weights_sha256": self.network.weights_sha256,
            "published_weights": self.network.published,
            "resize": self.network.resize,
            "samples": self.samples.to_json(),
            "reference": self.reference.to_json(),
            "warnings": self.warnings,
        }


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    The trace of the root is the nuclear norm of C1^(1/2) C2^(1/2), from symmetric eigendecompositions: real,
    and finite for singular covariances, where a general matrix square root fails.

    Raises:
        BidmError: shapes that differ, or numbers that are not finite.
    """
    _check(mean1, covariance1, mean2, covariance2)
    difference = mean1 - mean2
    traces = np.trace(covariance1) + np.trace(covariance2)
    root = _nuclear_norm(_root(covariance1), _root(covariance2))
    return max(float(difference @ difference + traces - 2 * root), 0.0)


def _check(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> None:
    if mean1.shape != mean2.shape or covariance1.shape != covariance2.shape:
        raise BidmError(
            f"the two sets have {mean1.shape[0]} and {mean2.shape[0]} features; "
            "statistics of another feature network cannot be compared"
        )
    if not all(np.isfinite(a).all() for a in (mean1, covariance1, mean2, covariance2)):
        raise BidmError("the features or saved statistics hold numbers that are not finite")


def _root(covariance: np.ndarray) -> np.ndarray:
    """F [D, D] with F^T F = C; eigenvalues below zero are rounding noise."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T


def _root_of(statistics: SetStatistics) -> np.ndarray:
    """F [R, D] with F^T F = C: the centered features themselves where there are fewer than D."""
    features = statistics.features
    if features is None or len(features) >= features.shape[1]:
        return _root(statistics.covariance)
    return (features - statistics.mean) / np.sqrt(len(features) - 1)


def _nuclear_norm(root1: np.ndarray, root2: np.ndarray) -> float:
    """Tr (C1 C2)^(1/2), the sum of the singular values of F1 F2^T."""
    return float(np.linalg.svd(root1 @ root2.T, compute_uv=False).sum())


def set_distance(samples: SetStatistics, reference: SetStatistics) -> float:
    """:func:`frechet_distance` of two sets, quick where they are smaller than their features are long.

    Raises:
        BidmError: as there.
    """
    _check(samples.mean, samples.covariance, reference.mean, reference.covariance)
    difference = samples.mean - reference.mean
    traces = np.trace(samples.covariance) + np.trace(reference.covariance)
    root = _nuclear_norm(_root_of(samples), _root_of(reference))
    return max(float(difference @ difference + traces - 2 * root), 0.0)


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, neighbours: int = _NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of features [N, D], [M, D].

    Precision: share of samples within the k-nearest-neighbour radius of some reference image; recall: the
    same with the roles exchanged. Of larger sets, 10,000 evenly spaced images are used.
    """
    samples, reference = _thinned(samples), _thinned(reference)
    radii_samples = _radii(samples, neighbours)
    radii_reference = _radii(reference, neighbours)
    covered = np.zeros(len(samples), dtype=bool)
    reached = np.zeros(len(reference), dtype=bool)
    for start, distances in _distance_blocks(samples, reference):
        rows = slice(start, start + len(distances))
        covered[rows] = (distances <= radii_reference[None]).any(axis=1)
        reached |= (distances <= radii_samples[rows, None]).any(axis=0)
    return float(covered.mean()), float(reached.mean())


def _thinned(features: np.ndarray) -> np.ndarray:
    if len(features) <= _MAX_NEIGHBOURHOOD:
        return features
    return features[np.linspace(0, len(features) - 1, _MAX_NEIGHBOURHOOD).astype(np.int64)]


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest neighbour, itself not counted."""
    k = min(neighbours, len(features) - 1)
    blocks = [np.partition(d, k, axis=1)[:, k] for _, d in _distance_blocks(features, features)]
    return np.concatenate(blocks)


def _distance_blocks(a: np.ndarray, b: np.ndarray, rows: int = 512) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances [rows, M]) of a [N, D] against b [M, D]."""
    center = b.mean(axis=0)
    a, b = a - center, b - center
    squares = np.einsum("md,md->m", b, b)
    for start in range(0, len(a), rows):
        part = a[start : start + rows]
        distances = np.einsum("nd,nd->n", part, part)[:, None] + squares[None] - 2 * part @ b.T
        yield start, np.clip(distances, 0, None)


def statistics_of(
    path: str | Path, network: FeatureNetwork, batch_size: int = 50, progress: bool = False
) -> SetStatistics:
    """Statistics of a folder, zip or ``.npz`` of images, or those saved in an ``.npz`` (``mu``, ``sigma``).

    Raises:
        BidmError: nothing readable there, fewer than two images, or statistics of another length.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file() and zipfile.is_zipfile(path):
        keys = npz_keys(path)
        if {"mu", "sigma"} <= set(keys) and not {"images", "arr_0"} & set(keys):
            return _saved(path, network)
    images = read_image_set(path)
    if len(images) < 2:
        raise BidmError(f"{path} holds one image; a distance between sets needs at least two in each")
    digest, sizes, parts = hashlib.sha256(), set(), []
    bar = tqdm(
        total=len(images), desc=f"features of {path.name}", unit="img", disable=None if progress else True
    )
    for batch in _batches(images, batch_size):
        for image in batch:
            digest.update(str(image.shape).encode() + image.tobytes())
        sizes.add(batch.shape[1:3])
        parts.append(network.extract(batch))
        bar.update(len(batch))
    bar.close()
    features = np.concatenate(parts)
    covariance = np.atleast_2d(np.cov(features.astype(np.float64), rowvar=False))
    return SetStatistics(
        path=path,
        count=len(images),
        sha256=digest.hexdigest() if path.is_dir() else sha256_of(path),
        hashed="pixels" if path.is_dir() else "file",
        size=sizes.pop() if len(sizes) == 1 else None,
        mean=features.mean(axis=0, dtype=np.float64),
        covariance=covariance,
        features=features,
        settings=_settings(path if path.is_dir() else path.parent),
    )


def _settings(folder: Path) -> dict[str, Any]:
    """What a sample.json beside the images says of them; nothing if there is none."""
    try:
        record = json.loads((folder / "sample.json").read_text(encoding="utf-8"))["settings"]
        return {key: value for key, value in record.items() if isinstance(value, (int, float, str, bool))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _saved(path: Path, network: FeatureNetwork) -> SetStatistics:
    mean, covariance = (np.asarray(load_npz_array(path, key), dtype=np.float64) for key in ("mu", "sigma"))
    if mean.shape != (network.dims,) or covariance.shape != (network.dims, network.dims):
        raise BidmError(
            f"{path} holds statistics of shape {mean.shape} and {covariance.shape}; "
            f"{network.name} has {network.dims} features"
        )
    return SetStatistics(path, None, sha256_of(path), "file", None, mean, covariance)


def _batches(images: ImageSet, batch_size: int) -> Iterator[np.ndarray]:
    """uint8 [N, H, W, 3], N <= batch_size; a batch ends where the size of the images changes."""
    batch: list[np.ndarray] = []
    for image in images:
        image = to_channels(image, 3)
        if batch and (len(batch) == batch_size or batch[0].shape != image.shape):
            yield np.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield np.stack(batch)


def compare(samples: SetStatistics, reference: SetStatistics, network: FeatureNetwork) -> Score:
    """The Frechet distance of two sets, with precision and recall where both have images.

    Raises:
        BidmError: as :func:`frechet_distance`.
    """
    value = set_distance(samples, reference)
    precision = recall = None
    if samples.features is not None and reference.features is not None:
        precision, recall = precision_recall(samples.features, reference.features)
    warnings = _warnings(samples, reference, network)
    return Score(network.metric, value, samples, reference, network, precision, recall, warnings)


def _warnings(samples: SetStatistics, reference: SetStatistics, network: FeatureNetwork) -> list[str]:
    found = []
    for what, one in (("samples", samples), ("reference", reference)):
        if one.count is not None and one.count < MIN_IMAGES:
            found.append(
                f"only {one.count:,} images in the {what}: below {MIN_IMAGES:,} the distance is biased "
                "upwards and must not be compared with published ones"
            )
    if samples.size and reference.size and samples.size != reference.size:
        found.append(f"the samples are {samples.size} pixels, the reference {reference.size}")
    if network.name == "inception" and not network.published:
        found.append(f"these are not the weights that define FID (SHA-256 {PUBLISHED_SHA256}...)")
    return found
