"""Range of float arrays: measured in one pass, and brought to what a network denoises.

Pixel models work in [-1, 1]. Floats from 0 to 1 and from 0 to 255 are converted to that, aloud; any other
range is refused, unless it is to be taken as it is. Latents are taken as they are: their standard deviation
is about 1 once they are multiplied by the scale factor of their first stage.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.files import cache_folder, write_atomically

TOLERANCE = 0.1
"""How far resampled images may overshoot [-1, 1]; 0..1 and 0..255 in proportion."""
SPREAD = (0.4, 2.5)
"""Standard deviations that latents of a trained first stage plausibly have once they are scaled."""
CACHED_BYTES = 1 << 28
"""Statistics of arrays from this size on are kept in the user's cache folder."""
_PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class ArrayStatistics:
    """Least and largest value, mean and standard deviation of an array, and CRC-32 of its values."""

    lowest: float
    highest: float
    mean: float
    deviation: float
    digest: int
    finite: bool


@dataclass(frozen=True)
class Conversion:
    """Values x * factor + offset, in words ``text``; ``notes`` are what deserves a line."""

    factor: float
    offset: float
    text: str
    notes: tuple[str, ...] = ()


def statistics_of_array(array: np.ndarray, path: Path) -> ArrayStatistics:
    """Statistics of floats [M, ...] in one pass; of large files they are kept, by path, size and time."""
    place = _cache_path(array, path) if array.nbytes >= CACHED_BYTES else None
    if place is not None and place.is_file():
        with suppress(OSError, ValueError, TypeError):
            return ArrayStatistics(**json.loads(place.read_text()))
    found = _measured(array)
    if place is not None:
        with suppress(BidmError), write_atomically(place) as temporary:
            temporary.write_text(json.dumps(asdict(found)))
    return found


def takes_pixels(model: DiffusionModel) -> bool:
    """True if a network denoises images themselves, gray or RGB, rather than latents."""
    latent = model.first_stage is not None or model.family == "ldm" or model.scale_factor != 1.0
    return not latent and model.sample_shape[0] in (1, 3)


def conversion(
    found: ArrayStatistics, model: DiffusionModel, where: str, as_is: bool, white: float | None = None
) -> Conversion:
    """Conversion of an array's values to what ``model`` denoises.

    Args:
        where: the array, for messages. as_is: take the values as they are. white: ``max_value`` of the file.

    Raises:
        BidmError: values that are not finite, or a range that is none of images for a pixel model.
    """
    if not found.finite:
        raise BidmError(f"{where} holds values that are not finite")
    spread = f"{found.lowest:.3g} to {found.highest:.3g}"
    if not takes_pixels(model):
        text = f"{spread}, standard deviation {found.deviation:.3g}, taken as scaled latents"
        return Conversion(1.0, 0.0, text, _spread_notes(found.deviation, model.scale_factor))
    low, high = found.lowest, found.highest
    overshoots = low >= -TOLERANCE / 2 and high > 0.5  # of 0 to 1, by resampling
    if as_is or (-1 - TOLERANCE <= low < 0 and high <= 1 + TOLERANCE and not overshoots) or low == high == 0:
        return Conversion(1.0, 0.0, f"range {spread}, taken as it is" + ("" if as_is else " for [-1, 1]"))
    if white is not None and low >= -TOLERANCE * white and high <= (1 + TOLERANCE) * white:
        return Conversion(2 / white, -1.0, f"range {spread}, taken as 0 to {white:g} and scaled to [-1, 1]")
    if low >= -TOLERANCE / 2 and high <= 1 + TOLERANCE / 2:
        return Conversion(2.0, -1.0, f"range {spread}, taken as 0 to 1 and scaled to [-1, 1]")
    if low >= -1 and 127 < high <= 256:
        return Conversion(2 / 255, -1.0, f"range {spread}, taken as 0 to 255 and scaled to [-1, 1]")
    raise BidmError(
        f"{where} ranges from {low:.4g} to {high:.4g}; pixels for this model lie in [-1, 1] "
        "(0 to 1 and 0 to 255 are converted); convert them, or take them as they are (`data_range`=as-is)"
    )


def _spread_notes(deviation: float, scale_factor: float) -> tuple[str, ...]:
    if SPREAD[0] <= deviation <= SPREAD[1]:
        return ()
    cause = ""
    if scale_factor != 1.0 and SPREAD[0] <= deviation * scale_factor <= SPREAD[1]:
        cause = f": they seem not to be multiplied by the model's scale factor {scale_factor:g}"
    elif SPREAD[0] <= deviation * 0.18215 <= SPREAD[1]:
        cause = ": they seem not to be multiplied by a scale factor (Stable Diffusion's is 0.18215)"
    return (f"a standard deviation of {deviation:.3g} is implausible for scaled latents (about 1){cause}",)


def _measured(array: np.ndarray) -> ArrayStatistics:
    lowest, highest, digest, finite = math.inf, -math.inf, 0, True
    total = squares = 0.0
    for piece in _pieces(array):
        digest = zlib.crc32(np.ascontiguousarray(piece).data, digest)
        values = piece.astype(np.float64)
        if not np.isfinite(values).all():
            finite = False
            break
        lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
        total, squares = total + float(values.sum()), squares + float(np.square(values).sum())
    mean = total / array.size
    deviation = math.sqrt(max(0.0, squares / array.size - mean * mean))
    return ArrayStatistics(lowest, highest, mean, deviation, digest, finite)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _PIECE_BYTES // max(1, array[0].nbytes))
    return (array[first : first + rows] for first in range(0, len(array), rows))


def _cache_path(array: np.ndarray, path: Path) -> Path | None:
    try:
        found = path.stat()
        key = f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {array.shape} {array.dtype}"
        return (
            cache_folder()
            / f"array-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:16]}.json"
        )
    except (OSError, RuntimeError):  # no home folder
        return None
