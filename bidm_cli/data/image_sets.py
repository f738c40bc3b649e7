"""Sets of images from a folder, a zip or an ``.npz``, read one at a time and never trusted.

images = read_image_set("cifar10-train.zip")
images[0]          # uint8 [H, W, C], C is 1 or 3
images.labels      # int64 [N] from class folders or the file's own labels, or None
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from PIL import Image

from bidm_cli.errors import BidmError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 1 << 26
"""Largest image that is decoded, 64 megapixels."""
MAX_ENTRY_BYTES = 1 << 28
"""Largest compressed image file taken out of a zip, 256 MiB unpacked."""
_SUSPECT_BYTES, _SUSPECT_RATIO = 1 << 26, 200


class ImageSet(ABC):
    """Sequence of images, uint8 [H, W, C] with C = 1 (grayscale) or 3 (RGB); sizes may differ.

    Attributes:
        path: the folder or file it comes from.
        names: name of each image in messages, [N].
        labels: int64 [N], or None.
        class_names: name of each label, or None if the labels came as numbers.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        labels: np.ndarray | None,
        class_names: list[str] | None = None,
    ) -> None:
        self.path, self.names = path, names
        self.labels, self.class_names = labels, class_names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> np.ndarray:
        """Image ``index``, uint8 [H, W, C].

        Raises:
            BidmError: the file is not an image, is damaged, or is larger than :data:`MAX_PIXELS`.
            IndexError: there is no such image.
        """


def read_image_set(path: str | Path) -> ImageSet:
    """Open a folder of images (searched recursively), a zip of images, or an ``.npz``.

    Class labels come from subfolders when all images lie in subfolders, numbered in sorted order. An
    ``.npz`` holds uint8 ``images`` or ``arr_0`` ([N, H, W] or [N, H, W, C]) and optionally ``labels`` or
    ``arr_1`` [N]; a scalar ``max_value`` says what stands for white if it is not 255. A ``grid.png`` beside
    other images is left out: ``bidm sample`` writes one.

    Raises:
        BidmError: nothing there, no images in it, or a file that is damaged or not what it claims to be.
    """
    path = Path(path)
    if path.is_dir():
        return _FolderImages(path)
    if not path.exists():
        raise BidmError(f"no images at {path}: there is no such folder or file")
    if not zipfile.is_zipfile(path):
        raise BidmError(f"{path} is neither a folder, a zip of images nor an .npz (or it is cut short)")
    try:
        return _ArrayImages(path) if path.suffix.lower() == ".npz" else _ZipImages(path)
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        raise BidmError(f"{path} is a damaged zip file: {error}") from error


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
    """One image file, uint8 [H, W, 1 or 3].

    Raises:
        BidmError: it is not an image, is damaged, or is larger than :data:`MAX_PIXELS`.
    """
    with open(path, "rb") as handle:
        return _decode(handle, str(path))


class _Files(ImageSet):
    """Images that are files, labelled by their folders."""

    def __init__(self, path: Path, files: list[str]) -> None:
        images = _image_names(files)
        if not images:
            raise BidmError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        super().__init__(path, images, *_labels_from_folders(images))


class _FolderImages(_Files):
    def __init__(self, path: Path) -> None:
        super().__init__(path, _walk(path))

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.path / self.names[index])


class _ZipImages(_Files):
    def __init__(self, path: Path) -> None:
        self._archive: zipfile.ZipFile | None = None
        self._process = -1
        with zipfile.ZipFile(path) as archive:
            super().__init__(path, [entry.filename for entry in archive.infolist() if not entry.is_dir()])

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.names[index]
        where = f"{name} in {self.path}"
        archive = self._open()
        entry = archive.getinfo(name)
        if entry.flag_bits & 1:
            raise BidmError(f"{where} is encrypted; unpack the zip into a folder first")
        if entry.file_size > MAX_ENTRY_BYTES:
            raise BidmError(f"{where} claims {entry.file_size:,} bytes; no image is read beyond 256 MiB")
        # The claimed size bounds what is unpacked, whatever the compressed stream would expand to.
        with _reading(where), archive.open(entry) as handle:
            content = handle.read(entry.file_size)
        return _decode(io.BytesIO(content), where)

    def _open(self) -> zipfile.ZipFile:
        # A forked data worker shares the parent's file position, so each process opens its own.
        if self._archive is None or self._process != os.getpid():
            self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}


class _ArrayImages(ImageSet):
    def __init__(self, path: Path) -> None:
        keys = npz_keys(path)
        key = next((k for k in ("images", "arr_0") if k in keys), None)
        if key is None:
            arrays = f"the arrays {', '.join(keys) or 'none'}"
            if {"mu", "sigma"} <= set(keys):
                arrays = "saved statistics (mu, sigma)"
            raise BidmError(f"{path} holds {arrays}, no images; images are the array 'images' or 'arr_0'")
        self._images = _as_images(load_npz_array(path, key), f"{path} [{key}]")
        self._scale = _white(path, keys)
        label_key = next((k for k in ("labels", "arr_1") if k in keys), None)
        labels = None if label_key is None else _as_labels(path, label_key, len(self._images))
        super().__init__(path, _Numbers(len(self._images)), labels)

    def __getitem__(self, index: int) -> np.ndarray:
        image = np.array(self._images[index])
        return image if self._scale is None else self._scale[image]


class _Numbers(Sequence[str]):
    """The names of an array's images: their indices."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return str(range(self._count)[index])


def npz_keys(path: Path) -> list[str]:
    """Names of the arrays in an ``.npz``.

    Raises:
        BidmError: it is no archive, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise BidmError(f"{path} is not a .npz file, or damaged: {error}") from error


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except BidmError:
        raise
    except Exception as error:  # what zip, its compressions and numpy's header raise cannot be listed
        raise BidmError(f"{where} is damaged or cannot be read: {error}") from error


def load_npz_array(path: Path, key: str) -> np.ndarray:
    """One array of an ``.npz``, mapped from the file where it is stored uncompressed.

    Pickled objects are refused, and so is an array that would unpack to over 200 times its size on disk.

    Raises:
        BidmError: as above, or the array is damaged.
    """
    where = f"{path} [{key}]"
    with _reading(where), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        if entry.file_size > max(_SUSPECT_BYTES, _SUSPECT_RATIO * entry.compress_size):
            raise BidmError(f"{where} would unpack {entry.compress_size:,} bytes to {entry.file_size:,}")
        with archive.open(entry) as handle:
            shape, fortran, dtype = _npy_header(handle, where)
            start = handle.tell()
            size = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
            if size != entry.file_size - start:
                raise BidmError(f"{where} is damaged: {shape} {dtype} does not fit its length")
            order: Any = "F" if fortran else "C"
            if entry.compress_type == zipfile.ZIP_STORED and size:
                offset = _data_offset(path, entry) + start
                return np.memmap(path, dtype, "r", offset, shape, order)
            return np.frombuffer(handle.read(size), dtype).reshape(shape, order=order)


def npz_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of an array of an ``.npz``, without reading it.

    Raises:
        BidmError: it is damaged or holds pickled objects.
    """
    where = f"{path} [{key}]"
    with _reading(where), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as handle:
        shape, _, dtype = _npy_header(handle, where)
        return shape, dtype


def _npy_header(handle: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy_format.read_magic(handle)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran, dtype = read(handle)
    if dtype.hasobject:
        raise BidmError(f"{where} holds pickled objects, which are never loaded")
    return shape, fortran, dtype


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    # The local header repeats name and extra field, the latter with a length of its own.
    with open(path, "rb") as handle:
        handle.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", handle.read(4))
    return entry.header_offset + 30 + name + extra


def _as_images(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype != np.uint8:
        raise BidmError(f"{where} is {array.dtype}; images are uint8, 0 to 255")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[3] not in (1, 3) or not all(array.shape):
        raise BidmError(f"{where} has shape {array.shape}; images are [N, H, W] or [N, H, W, 1 or 3]")
    return array


def _as_labels(path: Path, key: str, count: int) -> np.ndarray:
    labels = load_npz_array(path, key)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise BidmError(
            f"{path} [{key}] is {labels.dtype} {labels.shape}; {count} images need {count} integer labels"
        )
    return labels.astype(np.int64)


def _white(path: Path, keys: list[str]) -> np.ndarray | None:
    """A table uint8 [256] that stretches 0..max_value to 0..255; None if that is what they are."""
    if "max_value" not in keys:
        return None
    value = load_npz_array(path, "max_value")
    white = float(value.reshape(())) if value.size == 1 and value.dtype.kind in "iuf" else 0.0
    if not 1 <= white <= 255:
        raise BidmError(f"{path} [max_value] must be one number from 1 to 255")
    return np.clip(np.round(np.arange(256) * (255 / white)), 0, 255).astype(np.uint8)


def _walk(root: Path) -> list[str]:
    """Relative POSIX paths of all files below ``root``; links to folders are followed once."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name).relative_to(root).as_posix() for name in files]
    return found


def _image_names(names: list[str]) -> list[str]:
    """Those that name images, sorted; hidden files, ``__MACOSX`` and a lone ``grid.png`` left out."""

    def is_image(path: PurePosixPath) -> bool:
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        return path.suffix.lower() in IMAGE_SUFFIXES and not hidden

    images = sorted(name for name in names if is_image(PurePosixPath(name)))
    without_grid = [name for name in images if PurePosixPath(name).name != "grid.png"]
    return without_grid or images


def _labels_from_folders(names: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels by the first folder that differs between images; (None, None) if some image has none."""
    folders = [PurePosixPath(name).parent.parts for name in names]
    first, last = min(folders), max(folders)  # what these two share, all share
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    if any(len(parts) <= depth for parts in folders):
        return None, None
    classes = sorted({parts[depth] for parts in folders})
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[parts[depth]] for parts in folders], dtype=np.int64), classes


def _decode(handle: IO[bytes], where: str) -> np.ndarray:
    """An image file to uint8 [H, W, 1 or 3]; transparency is dropped, 16-bit gray keeps its high byte."""
    try:
        with Image.open(handle) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BidmError(f"{where} is {image.width} x {image.height}; over 64 megapixels are refused")
            if image.mode.startswith("I;16"):
                return (np.asarray(image) >> 8).astype(np.uint8)[:, :, None]
            if image.mode in ("I", "F"):
                raise BidmError(f"{where} has {image.mode!r} pixels; save it with 8 bits per channel")
            gray = image.mode in ("1", "L", "LA", "La")
            pixels = np.array(image.convert("L" if gray else "RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BidmError(f"{where} is not a readable image: {error}") from error
    return pixels[:, :, None] if gray else pixels
