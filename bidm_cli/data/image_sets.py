"""Sets of images from a folder, a zip, tar archives or an ``.npz``, read one at a time and never trusted.

images = read_image_set("cifar10-train.zip")
images[0]          # uint8 [H, W, C], C is 1 or 3
images.labels      # int64 [N] from class folders or the file's own labels, or None
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from bidm_cli.data.array_images import Numbers, as_pixels, choose_array, sample_labels, white_table
from bidm_cli.data.decode import decode
from bidm_cli.data.folder_images import FolderImages, walk
from bidm_cli.data.image_files import ImageSet, image_names
from bidm_cli.data.tar_images import TarImages, archives_among, shards_of
from bidm_cli.data.tar_index import is_tar
from bidm_cli.data.zip_images import ZipImages
from bidm_cli.errors import BidmError


def read_image_set(path: str | Path, labels: str | Path | None = None, upright: bool = True) -> ImageSet:
    """Open a folder of images (searched recursively), a zip or tar of them, or an ``.npz`` or ``.npy``.

    Several tar archives are a folder without images of its own, or a name with braces such as
    train-{0000..0146}.tar. Links and devices in them are left out, and nothing is extracted.

    Class labels come from the ``.cls`` files of a webdataset, a dataset.json (StyleGAN, EDM), metadata.csv or
    metadata.jsonl (Hugging Face), else from subfolders when all images lie in some, splits such as train and
    val left aside: numbered in sorted order, or by the whole numbers that their names are. An ``.npz`` holds
    ``images`` or ``arr_0``, uint8 [N, H, W] or [N, H, W, C], or one array of another name that can be images,
    and optionally ``labels`` or ``arr_1`` [N]; a scalar ``max_value`` says what stands for white if it is not
    255. A ``grid.png`` beside other images is left out: ``bidm sample`` writes one.

    Args:
        labels: instead of the above: "folders", "names" (file names up to the first underscore, as in
            guided-diffusion), "imagenet" (folders named by wnids), or a file
            (:func:`bidm_cli.data.label_files.user_labels`).
        upright: turn images as their EXIF orientation says; pytorch-fid ignores it.

    Raises:
        BidmError: nothing there, no images in it, or a file that is damaged or not what it claims to be.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, labels, upright)
    if not path.exists():
        shards = shards_of(path)
        if shards is None:
            raise BidmError(f"no images at {path}: there is no such folder or file")
        return TarImages(path, shards, labels, upright)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _ArrayImages(path, labels)
    if suffix != ".npz" and is_tar(path):
        return TarImages(path, [path], labels, upright)
    if not zipfile.is_zipfile(path):
        raise BidmError(
            f"{path} is neither a folder, a zip or tar of images nor an .npz (or it is cut short)"
        )
    try:
        return _ArrayImages(path, labels) if suffix == ".npz" else ZipImages(path, labels, upright)
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        raise BidmError(f"{path} is a damaged zip file: {error}") from error


def _folder(path: Path, labels: str | Path | None, upright: bool) -> ImageSet:
    """Images of a folder, or of the tar archives in it where it has none itself."""
    files = walk(path)
    archives = archives_among(files)
    if archives and not image_names(files):
        return TarImages(path, [path / name for name in archives], labels, upright)
    return FolderImages(path, files, labels, upright)


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [H, W, 1 or 3] with ``channels`` channels: gray is repeated, RGB becomes its luma (ITU-R 601).

    Raises:
        BidmError: ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise BidmError(f"images have 1 or 3 channels; a model of {channels} channels cannot use them")
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre crop [H, W, C] to the wanted shape's proportion, then resize (box filter down, bicubic up)."""
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    scale = min(rows / height, columns / width)
    crop_h, crop_w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (rows - crop_h) // 2, (columns - crop_w) // 2
    pixels = pixels[top : top + crop_h, left : left + crop_w]
    method = Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., c])).resize((width, height), method))
        for c in range(pixels.shape[2])
    ]
    return np.stack(planes, axis=-1)


def read_image(path: Path) -> np.ndarray:
    """One image file, uint8 [H, W, 1 or 3], turned upright as its EXIF orientation says.

    Raises:
        BidmError: it is not an image, is damaged, or is larger than 64 megapixels.
    """
    try:
        with open(path, "rb") as handle:
            return decode(handle, str(path))[0]
    except OSError as error:
        raise BidmError(f"{path} cannot be opened: {error.strerror}") from error


class _ArrayImages(ImageSet):
    def __init__(self, path: Path, labels: str | Path | None) -> None:
        chosen = choose_array(path)
        self._images, notes = as_pixels(chosen.load(), chosen.where)
        self._scale = white_table(path)
        count = len(self._images)
        labelling = sample_labels(path, count, labels)
        super().__init__(path, Numbers(count), labelling, (*chosen.notes, *notes))

    def __getitem__(self, index: int) -> np.ndarray:
        image = np.array(self._images[index]).astype(np.uint8)
        return image if self._scale is None else self._scale[image]
