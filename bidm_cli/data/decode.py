"""Image files to pixels: size bound, modes, and the orientation that cameras write beside the pixels."""

from __future__ import annotations

from typing import IO

import numpy as np
from PIL import Image, ImageOps

from bidm_cli.errors import BidmError, first_line

MAX_PIXELS = 1 << 26
"""Largest image that is decoded, 64 megapixels."""
_ORIENTATION = 0x0112


def decode(handle: IO[bytes], where: str, upright: bool = True) -> tuple[np.ndarray, int]:
    """(pixels uint8 [H, W, 1 or 3], EXIF orientation) of an image file.

    Transparency is dropped, 16-bit gray keeps its high byte.

    Args:
        upright: turn the pixels as the EXIF orientation says; otherwise they stay as stored.

    Raises:
        BidmError: it is not an image, is damaged, or is not to be decoded (:func:`refusal`).
    """
    try:
        with Image.open(handle) as image:
            problem = refusal(image)
            if problem is not None:
                raise BidmError(f"{where} {problem}")
            image.load()  # before its EXIF data are looked for, where damage to the pixels is no error
            turn = orientation(image)
            return _pixels(ImageOps.exif_transpose(image) if upright and turn != 1 else image), turn
    except BidmError:
        raise
    except Exception as error:  # what Pillow's decoders raise cannot be listed
        raise BidmError(f"{where} is not a readable image: {first_line(error)}") from error


def refusal(image: Image.Image) -> str | None:
    """Reason not to decode an image whose header was read; None if there is none."""
    if image.width * image.height > MAX_PIXELS:
        return f"is {image.width} x {image.height}; over 64 megapixels are refused"
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        return f"has {image.mode!r} pixels; save it with 8 bits per channel"
    return None


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where there is none, or none that can be read."""
    try:
        value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data beside sound pixels
        return 1
    return value if 1 <= value <= 8 else 1


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit gray; Pillow before 10.3 opens such a PNG as "I"
        return (np.asarray(image) >> 8).astype(np.uint8)[:, :, None]
    gray = image.mode in ("1", "L", "LA", "La")
    pixels = np.array(image.convert("L" if gray else "RGB"))
    return pixels[:, :, None] if gray else pixels
