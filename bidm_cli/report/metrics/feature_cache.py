"""Features of image sets, kept in the user's cache folder from one call to the next.

    features = cached_features(read_image_set("train.zip", upright=False), network)
    features.cached     # True from the second call on

An entry is found by the bytes of the image files, by the network's weights, resizing and kind of device, and
by the versions of the libraries that compute them. All bytes are read and hashed for that: neither names nor
times of change count, so nothing is assumed of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bidm_cli.data.image_files import FileImages, ImageSet
from bidm_cli.data.npz import load_npz_array
from bidm_cli.errors import BidmError
from bidm_cli.files import cache_folder, sha256_of, write_atomically
from bidm_cli.report.metrics.image_features import ImageFeatures, image_features
from bidm_cli.report.metrics.moments import BLOCK, release
from bidm_cli.report.metrics.networks.base import FeatureNetwork

MAX_BYTES = 1 << 31
"""Limit of all entries together, 2 GiB: those that were not used for longest go. One takes at most half."""
_LAYOUT = 3
"""To be raised when features are computed or kept in another way."""
_PACKAGES = ("bidm", "torch", "pillow", "timm", "pytorch-fid", "efficientnet-lite-pytorch")


def cached_features(
    images: ImageSet, network: FeatureNetwork, batch_size: int | None = None, progress: bool = False
) -> ImageFeatures:
    """Features as kept at an earlier call, else computed and kept; a note says which file they come from.

    A damaged entry is computed anew. Sets that change meanwhile, and those with over 1 GiB of features, are
    not kept.

    Raises:
        BidmError: as :func:`bidm_cli.report.metrics.image_features.image_features`.
    """
    stamps = _stamps(images)
    path = None if stamps is None else _entry(images, network, progress)
    kept = None if path is None else _recalled(path, len(images), network)
    if path is not None and kept is not None:
        with contextlib.suppress(OSError):
            os.utime(path)
        note = f"features as kept at an earlier call ({path})"
        return replace(kept, notes=(*kept.notes, note), cached=True)
    features = image_features(images, network, batch_size, progress)
    size = features.values.nbytes + (0 if features.spatial is None else features.spatial.nbytes)
    if size > MAX_BYTES // 2:
        note = f"{size:,} bytes of features are too many to be kept for the next call"
        return replace(features, notes=(*features.notes, note))
    if path is not None and _stamps(images) == stamps:
        _keep(path, features)
    return features


def _stamps(images: ImageSet) -> list[tuple[int, int]] | None:
    """(bytes, time of change or CRC) of the set's files; None if some cannot be read or are no files."""
    try:
        if images.path.is_file():
            found = images.path.stat()
            return [(found.st_size, found.st_mtime_ns)]
        if isinstance(images, FileImages):
            return [images.stamp(i) for i in range(len(images))]
    except OSError:
        pass
    return None


def _entry(images: ImageSet, network: FeatureNetwork, progress: bool) -> Path | None:
    """Path of the set's entry, there or not; None if a file cannot be read or there is no home folder."""
    try:
        key = {
            "layout": _LAYOUT,
            "images": _content(images, progress),
            "network": [network.name, network.weights_sha256, network.dims, network.resize],
            "device": network.device.type,
            "versions": [_version(name) for name in _PACKAGES],
        }
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return cache_folder() / f"features-{name}.npz"
    except (OSError, RuntimeError, BidmError):
        return None


def _content(images: ImageSet, progress: bool) -> str:
    """SHA-256 of a file, or over those of the images' files in their order (a folder, several archives)."""
    if images.path.is_file() or not isinstance(images, FileImages):
        return sha256_of(images.path)
    digest, disable = hashlib.sha256(), None if progress else True
    # Seconds for gigabytes: the bar is for those who wait.
    shown = tqdm(
        range(len(images)), f"hash of {images.path.name}", unit="img", disable=disable, leave=False, delay=2
    )
    for index in shown:
        with images.open(index) as handle:
            digest.update(hashlib.sha256(handle.read()).digest())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _recalled(path: Path, count: int, network: FeatureNetwork) -> ImageFeatures | None:
    """Features of ``count`` images from an entry, mapped from it; None if there is none or it is damaged (the
    archive has a CRC of all in it)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        about = json.loads(load_npz_array(path, "about").tobytes())
        values = load_npz_array(path, "values")
        spatial = load_npz_array(path, "spatial") if network.spatial_dims else None
        sizes = tuple((int(height), int(width)) for height, width in about["sizes"])
        found = ImageFeatures(
            values, str(about["sha256"]), str(about["hashed"]), sizes, tuple(about["notes"]), spatial=spatial
        )
    except Exception:  # any damage at all: it is computed anew
        return None
    expected = [(values, network.dims)] + ([] if spatial is None else [(spatial, network.spatial_dims)])
    fits = all(one.shape == (count, dims) and one.dtype == np.float32 for one, dims in expected)
    return found if fits else None


def _keep(path: Path, features: ImageFeatures) -> None:
    """Write an entry and remove old ones; without a folder to write to nothing is kept."""
    about: dict[str, Any] = {name: getattr(features, name) for name in ("sha256", "hashed", "sizes", "notes")}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with contextlib.suppress(BidmError):
        with write_atomically(path) as temporary:
            spatial = {} if features.spatial is None else {"spatial": features.spatial}
            _write_npz(temporary, {"about": text, "values": features.values, **spatial})
        _remove_old(path.parent)


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as numpy.savez does, block by block: mapped ones do not come into memory as a whole."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(array), BLOCK):
                    file.write(array[start : start + BLOCK].tobytes())
                    release(array)


def _remove_old(folder: Path) -> None:
    """Remove entries beyond the limit, the longest unused first; killed processes' leavings count as such."""
    entries, size = [], 0
    for entry in folder.glob("*features-*.npz"):
        with contextlib.suppress(OSError):
            entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry))
    for _, taken, entry in sorted(entries, reverse=True):
        size += taken
        if size > MAX_BYTES:
            with contextlib.suppress(OSError):
                entry.unlink()
