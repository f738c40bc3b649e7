"""Features of a set of images, and the hash of its pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from bidm_cli.data.image_files import FileImages, ImageSet
from bidm_cli.data.image_sets import to_channels
from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.moments import release, room_for
from bidm_cli.report.metrics.networks.base import FeatureNetwork


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a set of images.

    Attributes:
        values: float32 [N, D]; large ones are mapped from a file.
        spatial: float32 [N, S], the network's spatial features; None if it has none.
        sha256: of the file, or of decoded pixels in the order of their names (a folder, several archives).
        hashed: "file" or "pixels".
        sizes: (height, width) of the images, each once, the smallest first.
        notes: how they came about.
        cached: they were computed at an earlier call.
    """

    values: np.ndarray
    sha256: str
    hashed: str
    sizes: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()
    cached: bool = False
    spatial: np.ndarray | None = None


def image_features(
    images: ImageSet, network: FeatureNetwork, batch_size: int | None = None, progress: bool = False
) -> ImageFeatures:
    """Compute the features of all images.

    Raises:
        BidmError: an image is damaged.
    """
    batch_size = batch_size or network.batch_size
    digest, sizes, done, disable = hashlib.sha256(), set(), 0, None if progress else True
    values = room_for(len(images), network.dims)
    spatial = room_for(len(images), network.spatial_dims) if network.spatial_dims else None
    with tqdm(total=len(images), desc=f"features of {images.path.name}", unit="img", disable=disable) as bar:
        for batch in _batches(images, batch_size):
            for image in batch:
                digest.update(str(image.shape).encode() + image.tobytes())
            sizes.add(batch.shape[1:3])
            rows = slice(done, done := done + len(batch))
            values[rows], found = network.extract_all(batch)
            if spatial is not None:
                spatial[rows] = found
            if done % (20 * batch_size) < len(batch):
                _release_all(values, spatial)
            bar.update(len(batch))
    file = images.path.is_file()
    return ImageFeatures(
        values=values,
        spatial=spatial,
        sha256=sha256_of(images.path) if file else digest.hexdigest(),
        hashed="file" if file else "pixels",
        sizes=tuple(sorted(sizes, key=math.prod)),
        notes=_orientation_notes(images),
    )


def _release_all(values: np.ndarray, spatial: np.ndarray | None) -> None:
    release(values)
    if spatial is not None:
        release(spatial)


def _orientation_notes(images: ImageSet) -> tuple[str, ...]:
    """Note on images that lie on their side: pytorch-fid takes them so, and its numbers are kept."""
    lying = images.lying if isinstance(images, FileImages) else 0
    return (f"{lying:,} images lie on their side: their EXIF orientation is ignored",) if lying else ()


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
