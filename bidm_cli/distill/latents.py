"""Files of latents, or of pixels as floats: [M, C, H, W], with their labels and contexts."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.array_images import LATENTS, SampleArray, choose_array
from bidm_cli.data.npz import load_npz_array, npz_keys
from bidm_cli.diffusion.condition import shape_text
from bidm_cli.errors import BidmError


def paired_context(path: str | Path) -> Tensor | None:
    """Array ``context`` [M, L, D] of a .npz data set, one row per sample; None without one.

    Raises:
        BidmError: it is not that, or damaged.
    """
    path = Path(path)
    is_npz = path.suffix.lower() == ".npz" and zipfile.is_zipfile(path)
    if not is_npz or "context" not in npz_keys(path):
        return None
    array = load_npz_array(path, "context")
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise BidmError(
            f"{path} [context] is {array.dtype} {shape_text(array.shape)}; it has to be floats [M, L, D]"
        )
    return torch.from_numpy(np.array(array, dtype=np.float32))


def read_latents(path: Path, sample_shape: tuple[int, int, int]) -> tuple[SampleArray, np.ndarray, str]:
    """(the array's place; floats [M, *sample_shape], mapped where not compressed; its layout in words).

    Channels may come last; gray images may have none.

    Raises:
        BidmError: another shape, or no floats.
    """
    chosen = choose_array(path, LATENTS)
    found = x0 = chosen.load()
    layout = ""
    channels, height, width = sample_shape
    if x0.shape[1:] == (height, width, channels) != tuple(sample_shape):
        x0, layout = x0.transpose(0, 3, 1, 2), ", channels last"
    elif x0.shape[1:] == (height, width) and channels == 1:
        x0 = x0[:, None]
    if x0.ndim != 4 or x0.shape[1:] != tuple(sample_shape) or not len(x0) or x0.dtype.kind != "f":
        raise BidmError(
            f"{path} holds {found.dtype} {shape_text(found.shape)}; as latents for this model it has "
            f"to hold floats {shape_text(('M', *sample_shape))}, as the network denoises them (scaled)"
        )
    return chosen, x0, layout
