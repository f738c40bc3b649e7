"""Sets of images from a folder, a zip or an ``.npz``, read one at a time and never trusted.

images = read_image_set("cifar10-train.zip")
images[0]          # uint8 [H, W, C], C is 1 or 3
images.labels      # int64 [N] from class folders or the file's own labels, or None
"""

from __future__ import annotations

import copy
import errno
import io
import os
import stat
import struct
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from bidm_cli.data.array_images import Numbers, as_pixels, choose_array, sample_labels, white_table
from bidm_cli.data.decode import decode
from bidm_cli.data.label_files import METADATA, Read, dataset_json_labels, metadata_labels, user_labels
from bidm_cli.data.labels import Labels, file_name_labels, folder_labels, imagenet_labels
from bidm_cli.data.npz import StoredEntry, reading
from bidm_cli.errors import BidmError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
MAX_ENTRY_BYTES = 1 << 28
"""Largest compressed image file taken out of a zip, 256 MiB unpacked."""
STORED_WHOLE = 1 << 18
"""Entries up to this size are read whole, which checks their CRC; of larger stored ones what is asked for."""


class ImageSet(ABC):
    """Sequence of images, uint8 [H, W, C] with C = 1 (grayscale) or 3 (RGB); sizes may differ.

    Attributes:
        path: the folder or file it comes from.
        names: name of each image in messages, [N].
        labelling: labels with their source and names.
        notes: what about the way it was taken is not a matter of course.
    """

    def __init__(
        self, path: Path, names: Sequence[str], labelling: Labels, notes: tuple[str, ...] = ()
    ) -> None:
        self.path, self.names, self.labelling, self.notes = path, names, labelling, notes

    @property
    def labels(self) -> np.ndarray | None:
        """Labels int64 [N] as far as they are known without a model, or None."""
        return self.labelling.numbers

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in their order; None if the labels came as numbers."""
        return None if self.labelling.names is None else list(self.labelling.names)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> np.ndarray:
        """Image ``index``, uint8 [H, W, C].

        Raises:
            BidmError: the file is not an image, is damaged, or is larger than 64 megapixels.
            IndexError: there is no such image.
        """


def read_image_set(path: str | Path, labels: str | Path | None = None, upright: bool = True) -> ImageSet:
    """Open a folder of images (searched recursively), a zip of images, or an ``.npz`` or ``.npy`` of them.

    Class labels come from a dataset.json (StyleGAN, EDM), from metadata.csv or metadata.jsonl (Hugging Face),
    else from subfolders when all images lie in some, splits such as train and val left aside: numbered in
    sorted order, or by the whole numbers that their names are. An ``.npz`` holds ``images`` or ``arr_0``,
    uint8 [N, H, W] or [N, H, W, C], or one array of another name that can be images, and optionally
    ``labels`` or ``arr_1`` [N]; a scalar ``max_value`` says what stands for white if it is not 255. A
    ``grid.png`` beside other images is left out: ``bidm sample`` writes one.

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
        return _FolderImages(path, labels, upright)
    if not path.exists():
        raise BidmError(f"no images at {path}: there is no such folder or file")
    if path.suffix.lower() == ".npy":
        return _ArrayImages(path, labels)
    if not zipfile.is_zipfile(path):
        raise BidmError(f"{path} is neither a folder, a zip of images nor an .npz (or it is cut short)")
    try:
        return (
            _ArrayImages(path, labels) if path.suffix.lower() == ".npz" else _ZipImages(path, labels, upright)
        )
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
    """One image file, uint8 [H, W, 1 or 3], turned upright as its EXIF orientation says.

    Raises:
        BidmError: it is not an image, is damaged, or is larger than 64 megapixels.
    """
    try:
        with open(path, "rb") as handle:
            return decode(handle, str(path))[0]
    except OSError as error:
        raise BidmError(f"{path} cannot be opened: {error.strerror}") from error


class FileImages(ImageSet):
    """Images that are files, in a folder or a zip.

    Attributes:
        upright: images are turned as their EXIF orientation says. lying: number of images decoded so far that
            should have been turned and were not.
    """

    def __init__(
        self,
        path: Path,
        files: list[str],
        labels: str | Path | None,
        upright: bool,
        read: Read,
    ) -> None:
        images = _image_names(files)
        if not images:
            raise BidmError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        labelling = _labelling(images, files, labels, read)
        super().__init__(path, images, labelling, labelling.notes)
        self.upright, self.lying = upright, 0

    def _decoded(self, handle: IO[bytes], where: str) -> np.ndarray:
        pixels, turn = decode(handle, where, self.upright)
        self.lying += turn != 1 and not self.upright
        return pixels

    @abstractmethod
    def stamp(self, index: int) -> tuple[int, int]:
        """(bytes, time of the last change in ns or CRC) of a file.

        Raises:
            OSError: it is gone.
        """

    @abstractmethod
    def open(self, index: int) -> IO[bytes]:
        """A file's bytes, to be read and closed.

        Raises:
            OSError, BidmError: it is gone, encrypted or damaged.
        """

    def keep(self, kept: np.ndarray) -> FileImages:
        """The set of the images ``kept`` [M] alone."""
        smaller = copy.copy(self)
        smaller.names = [self.names[i] for i in kept.tolist()]
        smaller.labelling = self.labelling.take(kept)
        return smaller


class _FolderImages(FileImages):
    def __init__(self, path: Path, labels: str | Path | None, upright: bool) -> None:
        super().__init__(path, _walk(path), labels, upright, lambda name: _bounded(path / name))

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.path / self.names[index]
        try:
            with open(path, "rb") as handle:
                return self._decoded(handle, str(path))
        except OSError as error:
            raise BidmError(f"{path} cannot be opened: {error.strerror}") from error

    def stamp(self, index: int) -> tuple[int, int]:
        found = os.stat(os.path.join(self.path, self.names[index]))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        return found.st_size, found.st_mtime_ns

    def open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self.path, self.names[index]), "rb")


class _ZipImages(FileImages):
    def __init__(self, path: Path, labels: str | Path | None, upright: bool) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._process, self._lock = -1, threading.Lock()
        files = [entry.filename for entry in self.archive.infolist() if not entry.is_dir()]
        super().__init__(path, files, labels, upright, self.content)

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.names[index]
        return self._decoded(io.BytesIO(self.content(name)), f"{name} in {self.path}")

    def stamp(self, index: int) -> tuple[int, int]:
        entry = self.archive.getinfo(self.names[index])
        return entry.file_size, entry.CRC

    def open(self, index: int) -> IO[bytes]:
        entry = self.archive.getinfo(self.names[index])
        large = entry.file_size > STORED_WHOLE and entry.compress_type == zipfile.ZIP_STORED
        if large and not entry.flag_bits & 1:
            return io.BufferedReader(StoredEntry(self.path, entry))
        return io.BytesIO(self.content(entry.filename))

    def content(self, name: str) -> bytes:
        """Bytes of an entry, whose CRC is checked.

        Raises:
            BidmError: it is encrypted, damaged, or claims over :data:`MAX_ENTRY_BYTES`.
        """
        where = f"{name} in {self.path}"
        with reading(where):
            entry = self.archive.getinfo(name)
        if entry.flag_bits & 1:
            raise BidmError(f"{where} is encrypted; unpack the zip into a folder first")
        if entry.file_size > MAX_ENTRY_BYTES:
            raise BidmError(f"{where} claims {entry.file_size:,} bytes; no image is read beyond 256 MiB")
        # The claimed size bounds what is unpacked, whatever the compressed stream would expand to.
        with reading(where), self.archive.open(entry) as handle:
            return handle.read(entry.file_size)

    @property
    def archive(self) -> zipfile.ZipFile:
        """The archive, opened in this process."""
        # A forked data worker shares the parent's file position, so each process opens its own.
        with self._lock:
            if self._archive is None or self._process != os.getpid():
                self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
            return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


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


def _labelling(images: list[str], files: list[str], labels: str | Path | None, read: Read) -> Labels:
    """Labels of images as ``labels`` says, else as the data set keeps them."""
    if labels is not None:
        return _asked(labels, images)
    packed = [name for name in files if PurePosixPath(name).name == "dataset.json"]
    packed = [place for place in packed if all(_below(place, name) for name in images)]
    if packed:
        return dataset_json_labels(images, packed[0], read)
    metadata = sorted(name for name in files if PurePosixPath(name).name in METADATA and not _hidden(name))
    return metadata_labels(images, metadata, read) if metadata else folder_labels(images)


def _asked(labels: str | Path, images: Sequence[str]) -> Labels:
    """Labels as the user wants them.

    Raises:
        BidmError: a file that cannot be read or that lacks images.
    """
    if labels == "folders":
        return folder_labels(images, asked=True)
    if labels == "names":
        return file_name_labels(images)
    if labels == "imagenet":
        return imagenet_labels(folder_labels(images, asked=True))
    return user_labels(images, Path(labels))


def _below(place: str, name: str) -> bool:
    folder = place.rpartition("/")[0]
    return not folder or name.startswith(f"{folder}/")


def _bounded(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_ENTRY_BYTES:
            raise BidmError(f"{path} is larger than 256 MiB")
        return path.read_bytes()
    except OSError as error:
        raise BidmError(f"{path} cannot be read: {error.strerror}") from error


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
    images = sorted(
        name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not _hidden(name)
    )
    without_grid = [name for name in images if name.rpartition("/")[2] != "grid.png"]
    return without_grid or images


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
