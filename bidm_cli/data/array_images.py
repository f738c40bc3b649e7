"""Arrays of images in .npz and .npy files: the one to take, its layout, its labels."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bidm_cli.data.arrays import map_array
from bidm_cli.data.label_files import LABEL_NAMES, integer_labels, user_labels
from bidm_cli.data.labels import Labels, no_labels
from bidm_cli.data.npz import load_npz_array, npz_header, npz_keys, reading
from bidm_cli.errors import BidmError

IMAGES, LATENTS = ("images", "arr_0"), ("latents", "images", "arr_0")
"""Names under which samples lie, the preferred first."""
_OTHERS = (*LABEL_NAMES, "context", "embeddings", "mask", "mu", "sigma")


@dataclass(frozen=True)
class SampleArray:
    """The array of a file that holds its samples; ``name`` is None in a .npy."""

    path: Path
    name: str | None
    dtype: np.dtype
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The array in messages."""
        return str(self.path) if self.name is None else f"{self.path} [{self.name}]"

    def load(self) -> np.ndarray:
        """Its numbers, mapped from the file where they are not compressed."""
        return map_array(self.path) if self.name is None else load_npz_array(self.path, self.name)


class Numbers(Sequence[str]):
    """The names of an array's images: their indices."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return str(range(self._count)[index])


def choose_array(path: Path, names: Sequence[str] = IMAGES) -> SampleArray:
    """The first of ``names``, or the one array that can be images or latents, whatever its name.

    Raises:
        BidmError: none, or several, or the file is damaged.
    """
    if path.suffix.lower() == ".npy":
        return SampleArray(path, None, map_array(path).dtype)
    keys = npz_keys(path)
    known = next((key for key in names if key in keys), None)
    if known is not None:
        return SampleArray(path, known, npz_header(path, known)[1])
    found = [key for key in keys if key not in _OTHERS and _can_be_samples(path, key)]
    if len(found) != 1:
        arrays = f"the arrays {', '.join(keys[:8]) or 'none'}"
        if {"mu", "sigma"} <= set(keys):
            arrays = "saved statistics (mu, sigma)"
        what = "several that can be images" if found else "no images"
        raise BidmError(f"{path} holds {arrays}, {what}; images are the array 'images' or 'arr_0'")
    note = f"its array {found[0]!r} is taken, the only one that can be images"
    return SampleArray(path, found[0], npz_header(path, found[0])[1], (note,))


def holds_floats(path: Path) -> bool:
    """True if a data set is an array of floats rather than images: a .npy, or a .npz with one."""
    suffix = path.suffix.lower()
    if (
        suffix not in (".npy", ".npz")
        or not path.is_file()
        or (suffix == ".npz" and not zipfile.is_zipfile(path))
    ):
        return False
    chosen = choose_array(path, LATENTS)
    return chosen.name == "latents" or chosen.dtype.kind == "f"


def as_pixels(array: np.ndarray, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Images [N, H, W, C] of whole numbers from 0 to 255, and what was changed for that.

    Raises:
        BidmError: other numbers, or no shape of images.
    """
    notes: tuple[str, ...] = ()
    if array.dtype == np.bool_:
        array, notes = array.astype(np.uint8) * 255, ("false and true are taken as 0 and 255",)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8 and array.size:
        lowest, highest = int(array.min()), int(array.max())
        if lowest < 0 or highest > 255:
            raise BidmError(
                f"{where} is {array.dtype} from {lowest} to {highest}; images are uint8, 0 to 255"
            )
        notes = (f"{array.dtype} numbers from {lowest} to {highest} are taken as 0 to 255",)
    elif array.dtype != np.uint8:
        raise BidmError(f"{where} is {array.dtype}; images are uint8, 0 to 255")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array, notes = array.transpose(0, 2, 3, 1), (*notes, "channels are taken to come first")
    if array.ndim != 4 or array.shape[3] not in (1, 3) or not all(array.shape):
        raise BidmError(f"{where} has shape {array.shape}; images are [N, H, W] or [N, H, W, 1 or 3]")
    return array, notes


def sample_labels(path: Path, count: int, asked: str | Path | None = None) -> Labels:
    """Labels [count] beside the samples of a .npz, or of the file ``asked``.

    Raises:
        BidmError: ``labels`` or ``arr_1`` that are not ``count`` whole numbers, or such a file.
    """
    if asked in ("folders", "names", "imagenet"):
        raise BidmError(
            f"{path} has neither folders nor file names (`data_labels`={asked}); give a file of labels"
        )
    if asked is not None:
        return user_labels(Numbers(count), Path(asked))
    problem = (
        "the model is class-conditional and these images have no labels; add an array 'labels', give a file "
        "of them (`data_labels`), or use `synthetic`"
    )
    keys = npz_keys(path) if path.suffix.lower() == ".npz" else []
    for key in (name for name in LABEL_NAMES if name in keys):
        values = load_npz_array(path, key)
        try:
            return Labels(f"its array {key!r}", integer_labels(values, f"{path} [{key}]", count))
        except BidmError:
            if key in ("labels", "arr_1"):
                raise
    return no_labels("none", problem)


def digest_of_array(path: Path) -> str:
    """SHA-256 over the CRC-32 of an image array's file, which a .npz says itself."""
    chosen = choose_array(path)
    if chosen.name is None:
        crc = zlib.crc32(map_array(path).data)
    else:
        with reading(chosen.where), zipfile.ZipFile(path) as archive:
            crc = archive.getinfo(f"{chosen.name}.npy").CRC
    return hashlib.sha256(f"{chosen.dtype} {crc:08x}".encode()).hexdigest()


def white_table(path: Path) -> np.ndarray | None:
    """A table uint8 [256] that stretches 0..max_value to 0..255; None if that is what they are.

    Raises:
        BidmError: ``max_value`` is not one number from 1 to 255.
    """
    white = max_value(path)
    if white is None:
        return None
    return np.clip(np.round(np.arange(256) * (255 / white)), 0, 255).astype(np.uint8)


def max_value(path: Path) -> float | None:
    """The number that stands for white in a .npz, if it says one.

    Raises:
        BidmError: it is not one number from 1 to 255.
    """
    if path.suffix.lower() != ".npz" or "max_value" not in npz_keys(path):
        return None
    value = load_npz_array(path, "max_value")
    white = float(value.reshape(())) if value.size == 1 and value.dtype.kind in "iuf" else 0.0
    if not 1 <= white <= 255:
        raise BidmError(f"{path} [max_value] must be one number from 1 to 255")
    return white


def _can_be_samples(path: Path, key: str) -> bool:
    shape, dtype = npz_header(path, key)
    if not all(shape):
        return False
    if dtype.kind == "f":
        return len(shape) == 4
    flat = len(shape) == 3 or (len(shape) == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3)))
    return dtype.kind in "iub" and flat
