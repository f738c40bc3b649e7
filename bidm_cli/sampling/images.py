"""Decoded images to bytes: PNGs, a grid of them, and the one-array file that FID codes read.

Families differ in the last rounding from [-1, 1] to 0..255 (:attr:`SamplingConvention.rounding`). FID sees
the difference, so each keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bidm_cli.diffusion.convention import Rounding
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.packed.recording.decoder import decoder_of
from bidm_cli.sampling.tiles import in_tiles

GRID_IMAGES = 256
CELL = 64
GAP = 2


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C]: (x + 1) 127.5, clamped; NaN becomes black."""
    scaled = ((torch.nan_to_num(images.float(), nan=-1.0) + 1.0) * 127.5).clamp(0.0, 255.0)
    if rounding == "nearest":
        scaled = (scaled + 0.5).floor().clamp(0.0, 255.0)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def decode(model: DiffusionModel, latents: Tensor) -> np.ndarray:
    """Latents or pixels [N, C, H, W] to uint8 images [N, H', W', 1 or 3].

    One image at a time: a decoder needs much memory, and its rounding would depend on the batch. Large
    latents are decoded in tiles (:mod:`bidm_cli.sampling.tiles`).

    Raises:
        BidmError: the result has neither 1 nor 3 channels, as of a latent model without its first stage.
    """
    if not is_decodable(model):
        raise BidmError(no_images(model.sample_shape[0]))
    rounding, decoded = model.convention.rounding, decoder_of(model)
    images = np.concatenate([to_uint8(in_tiles(decoded, latent[None]), rounding) for latent in latents])
    if images.shape[3] not in (1, 3):
        raise BidmError(no_images(images.shape[3]))
    return images


def is_decodable(model: DiffusionModel) -> bool:
    """True if images can come of the model: it has a first stage, or denoises pixels."""
    return model.first_stage is not None or not model.is_latent


def no_images(channels: int) -> str:
    """Message for a model that is not :func:`is_decodable`."""
    return (
        f"this model gives latents of {channels} channels and has no first stage to decode them; give one "
        "with `first_stage`, or use `raw` for the array"
    )


def write_png(path: Path, image: np.ndarray) -> None:
    """Write one image, uint8 [H, W, 1 or 3], as all files here: whole, or BidmError."""
    with write_atomically(path, clears=False) as temporary:
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(temporary, format="PNG")


def read_png(path: Path) -> np.ndarray:
    """Read an image that :func:`write_png` wrote, uint8 [H, W, 1 or 3]; BidmError if it is none."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise BidmError(
            f"{path} cannot be read ({error}); delete it and run the same command again"
        ) from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def grid(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] side by side on black, as square as N allows: [H', W', C].

    Images smaller than 64 pixels are enlarged by nearest neighbour, so that an 8x8 digit can be seen; the gap
    grows with them.
    """
    n, height, width, channels = images.shape
    scale = max(1, CELL // max(height, width))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = max(GAP, scale)
    padded = np.zeros((rows * columns, height * scale + gap, width * scale + gap, channels), dtype=np.uint8)
    padded[:n, :-gap, :-gap] = images
    sheet = padded.reshape(rows, columns, *padded.shape[1:]).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * padded.shape[1], columns * padded.shape[2], channels)[:-gap, :-gap]


def write_npz(path: Path, images: np.ndarray, labels: Sequence[int] | None = None) -> None:
    """Write ADM's layout: ``arr_0`` uint8 [N, H, W, C] and, with labels, ``arr_1`` int64 [N]."""
    arrays = [images] if labels is None else [images, np.asarray(labels, dtype=np.int64)]
    with write_atomically(path, clears=False) as temporary:
        np.savez(temporary, *arrays)


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write one array."""
    with write_atomically(path, clears=False) as temporary:
        np.save(temporary, array)
