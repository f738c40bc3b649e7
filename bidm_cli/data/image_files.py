"""Sets of images that are files: what they have in common wherever the files lie, and their labels."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from bidm_cli.data.decode import decode
from bidm_cli.data.label_files import METADATA, Read, dataset_json_labels, metadata_labels, user_labels
from bidm_cli.data.labels import Labels, file_name_labels, folder_labels, imagenet_labels, no_labels
from bidm_cli.errors import BidmError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
DATASET_JSON = "dataset.json"
MAX_ENTRY_BYTES = 1 << 28
"""Largest image file taken out of an archive, 256 MiB unpacked."""
STORED_WHOLE = 1 << 18
"""Entries up to this size are read whole, which checks a zip's CRC; of larger ones what is asked for."""


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


class FileImages(ImageSet):
    """Images that are files, in a folder or an archive.

    Attributes:
        upright: images are turned as their EXIF orientation says. lying: number of images decoded so far that
            should have been turned and were not.

    Raises:
        BidmError: there are no ``names``.
    """

    def __init__(
        self, path: Path, names: Sequence[str], labelling: Labels, upright: bool, notes: tuple[str, ...] = ()
    ) -> None:
        if not names:
            raise BidmError(no_images(path))
        super().__init__(path, names, labelling, (*labelling.notes, *notes))
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


def labels_of_files(
    images: Sequence[str], files: Sequence[str], labels: str | Path | None, read: Read
) -> Labels:
    """Labels of images as ``labels`` says, else as the data set keeps them among its ``files``.

    Raises:
        BidmError: a file ``labels`` that cannot be read or that lacks images.
    """
    if not images:
        return no_labels("none", no_images(Path()))
    if labels is not None:
        return _asked(labels, images)
    packed = [name for name in files if PurePosixPath(name).name == DATASET_JSON]
    packed = [place for place in packed if all(_below(place, name) for name in images)]
    if packed:
        return dataset_json_labels(images, packed[0], read)
    metadata = sorted(name for name in files if PurePosixPath(name).name in METADATA and not is_hidden(name))
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


def image_names(files: Sequence[str]) -> list[str]:
    """Those that name images, sorted; hidden files, ``__MACOSX`` and a lone ``grid.png`` left out."""
    images = sorted(name for name in files if is_image(name))
    without_grid = [name for name in images if name.rpartition("/")[2] != "grid.png"]
    return without_grid or images


def is_image(name: str) -> bool:
    """True if a file is an image by its name, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not is_hidden(name)


def is_label_file(name: str) -> bool:
    """True if a file may hold labels of the images around it."""
    return name.rpartition("/")[2] in (DATASET_JSON, *METADATA)


def is_hidden(name: str) -> bool:
    """True if a file or one of its folders begins with a dot, or lies in ``__MACOSX``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def no_images(path: Path) -> str:
    """Sentence on a data set without images."""
    return f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
