"""Statistics saved in an ``.npz``: a mean and a covariance of features, or the features themselves.

    saved = read_saved(Path("VIRTUAL_imagenet256_labeled.npz"), network)

Layouts: pytorch-fid's, TTUR's and EDM's ``mu`` [D] and ``sigma`` [D, D]; guided-diffusion's reference
batches, which hold some images (``arr_0``) beside them, and those of sFID's features, ``mu_s`` [S] and
``sigma_s`` [S, S]; the same two arrays under other names, found by their
shapes; score_sde's features ``pool_3`` [N, D].
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bidm_cli.data.npz import load_npz_array, npz_header, npz_keys
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.report.metrics.moments import moments
from bidm_cli.report.metrics.networks.base import FeatureNetwork

_MEAN, _COVARIANCE = "mu", "sigma"
_SPATIAL = ("mu_s", "sigma_s")
_FEATURES = ("pool_3", "features", "activations")
Header = tuple[tuple[int, ...], np.dtype]
_ASYMMETRY = 1e-3
"""Largest difference between a covariance and its transpose, as a share of its largest entry."""


@dataclass(frozen=True)
class SavedStatistics:
    """Feature statistics of a set of images in an ``.npz``.

    Attributes:
        mean, covariance: float64 [D] and [D, D].
        features: float32 [N, D], if the file holds them.
        notes: names of the arrays, and what is known of their making.
        spatial: mean [S] and covariance [S, S] of the spatial features, if the file holds them.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None
    notes: tuple[str, ...]
    spatial: tuple[np.ndarray, np.ndarray] | None = None


def read_saved(path: Path, network: FeatureNetwork) -> SavedStatistics | None:
    """The statistics saved in a file; None if it is no ``.npz`` or holds none.

    Raises:
        BidmError: a mean without a covariance, of other features than the network's, or numbers that cannot
            be one.
    """
    if not _is_npz(path):
        return None
    shapes = _shapes(path, needed=(_MEAN, _COVARIANCE))
    pair = _pair(path, shapes, network)
    if pair is not None:
        mean, covariance = _moments(path, pair, network)
        spatial, more = _spatial(path, shapes, network)
        notes = _notes(pair, network, _has_images(shapes)) + more
        return SavedStatistics(mean, covariance, None, notes, spatial)
    key = next((key for key in _FEATURES if key in shapes and len(shapes[key][0]) == 2), None)
    return None if key is None else _from_features(path, key, network)


def save_statistics(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Write ``mu`` and ``sigma`` in pytorch-fid's layout.

    Raises:
        BidmError: the folder cannot be written to, or the disk is full.
    """
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, mu=mean, sigma=covariance)


def has_images(path: Path) -> bool:
    """Return True if an ``.npz`` has an array with the dimensions of images."""
    return _is_npz(path) and _has_images(_shapes(path))


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz" and path.is_file() and zipfile.is_zipfile(path)


def _has_images(shapes: dict[str, Header]) -> bool:
    return any(len(shape) in (3, 4) for shape, _ in shapes.values())


def _shapes(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Header]:
    """(shape, type) of each array by name; damaged or pickled ones are passed over, unless needed."""
    found = {}
    for key in npz_keys(path):
        try:
            found[key] = npz_header(path, key)
        except BidmError:
            if key in needed:
                raise
    return found


def _pair(path: Path, shapes: dict[str, Header], network: FeatureNetwork) -> tuple[str, str] | None:
    """Names of mean and covariance: ``mu`` and ``sigma``, else the only arrays of their shapes."""
    named = [key for key in (_MEAN, _COVARIANCE) if key in shapes]
    if len(named) == 2:
        return _MEAN, _COVARIANCE
    dims = network.dims
    floats = {key: shape for key, (shape, dtype) in shapes.items() if dtype.kind == "f"}
    means = [key for key, shape in floats.items() if shape in ((dims,), (1, dims), (dims, 1))]
    covariances = [key for key, shape in floats.items() if shape == (dims, dims)]
    if len(means) == len(covariances) == 1 and means != covariances:
        return means[0], covariances[0]
    if means and covariances:
        listed = f"means ({', '.join(means)}) or covariances ({', '.join(covariances)})"
        raise BidmError(f"{path} holds several {listed}; keep one of each, as {_MEAN} and {_COVARIANCE}")
    if named:
        raise BidmError(
            f"{path} holds {named[0]} {shapes[named[0]][0]} alone; saved statistics are {_MEAN} [D] and "
            f"{_COVARIANCE} [D, D]"
        )
    return None


def _spatial(
    path: Path, shapes: dict[str, Header], network: FeatureNetwork
) -> tuple[tuple[np.ndarray, np.ndarray] | None, tuple[str, ...]]:
    """Mean and covariance of spatial features, None without any that fit the network; and a note on them."""
    dims = network.spatial_dims
    if not dims or not all(key in shapes for key in _SPATIAL):
        return None, ()
    try:
        found = [shapes[key][0] for key in _SPATIAL]
        if found != [(dims,), (dims, dims)]:
            raise BidmError(f"{found[0]} and {found[1]}; the network has {dims} spatial features")
        mean, covariance = (np.asarray(load_npz_array(path, key), dtype=np.float64) for key in _SPATIAL)
        _check_covariance(f"{path} [{_SPATIAL[1]}]", covariance)
    except (BidmError, ValueError, TypeError) as error:
        return None, (f"{' and '.join(_SPATIAL)} are left out ({error})",)
    return (mean, covariance), (f"the spatial distance is to {' and '.join(_SPATIAL)} as saved",)


def _moments(path: Path, pair: tuple[str, str], network: FeatureNetwork) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of a file, checked."""
    arrays = [load_npz_array(path, key) for key in pair]
    for key, array in zip(pair, arrays, strict=True):
        if array.dtype.kind not in "fiu":
            raise BidmError(f"{path} [{key}] is {array.dtype}; saved statistics are real numbers")
    mean, covariance = (np.asarray(array, dtype=np.float64) for array in arrays)
    if mean.ndim == 2 and 1 in mean.shape:
        mean = mean.reshape(-1)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise BidmError(
            f"{path} [{pair[1]}] has shape {covariance.shape}; a covariance of {network.dims} features is "
            f"{(network.dims, network.dims)}, and neither variances nor a root of it will do"
        )
    if mean.shape != (network.dims,) or covariance.shape != (network.dims, network.dims):
        raise BidmError(
            f"{path} holds statistics of shape {mean.shape} and {covariance.shape}; "
            f"{network.name} has {network.dims} features"
        )
    _check_covariance(f"{path} [{pair[1]}]", covariance)
    return mean, covariance


def _check_covariance(where: str, covariance: np.ndarray) -> None:
    """Raise BidmError for a matrix that is not symmetric or has variances below 0; NaN is found later."""
    largest = float(np.abs(covariance).max())
    if not np.isfinite(largest):
        raise BidmError(f"{where} holds numbers that are not finite")
    if np.abs(covariance - covariance.T).max() > _ASYMMETRY * largest:
        raise BidmError(f"{where} is not symmetric, so it is no covariance")
    if covariance.diagonal().min() < -_ASYMMETRY * largest:
        raise BidmError(f"{where} has variances below 0, so it is no covariance")


def _notes(pair: tuple[str, str], network: FeatureNetwork, beside_images: bool) -> tuple[str, ...]:
    origin = "the file does not say which feature network gave them"
    if beside_images and network.name == "inception":
        origin = (
            "in guided-diffusion's batches they come from TensorFlow's Inception, which pytorch-fid's port "
            "equals to a few digits"
        )
    return (f"the distance is to {pair[0]} and {pair[1]} as saved; {origin}",)


def _from_features(path: Path, key: str, network: FeatureNetwork) -> SavedStatistics:
    """Statistics of saved features [N, D], as score_sde keeps them."""
    features = load_npz_array(path, key)
    if features.dtype.kind != "f" or features.shape[1] != network.dims or len(features) < 2:
        raise BidmError(
            f"{path} [{key}] is {features.dtype} {features.shape}; {network.name} has {network.dims} "
            "features, of at least two images"
        )
    values = features if features.dtype == np.float32 else features.astype(np.float32)
    mean, covariance = moments(values)
    note = f"features are {key} as saved; the file does not say which feature network gave them"
    return SavedStatistics(mean, covariance, values, (note,))
