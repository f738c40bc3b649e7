"""Files of latents: floats [M, C, H, W] as the network denoises them, with their labels and contexts."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.arrays import map_array
from bidm_cli.data.image_sets import load_npz_array, npz_header, npz_keys
from bidm_cli.diffusion.condition import shape_text
from bidm_cli.errors import BidmError


def holds_latents(path: str | Path) -> bool:
    """True if a data set is an array of floats rather than images: a .npy, or a .npz with one."""
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return path.is_file()
    name = _name(path)
    return name == "latents" or (name is not None and npz_header(path, name)[1].kind == "f")


def paired_context(path: str | Path) -> Tensor | None:
    """Array ``context`` [M, L, D] of a .npz data set, one row per sample; None without one.

    Raises:
        BidmError: it is not that, or damaged.
    """
    path = Path(path)
    if _name(path, "context") is None:
        return None
    array = load_npz_array(path, "context")
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise BidmError(
            f"{path} [context] is {array.dtype} {shape_text(array.shape)}; it has to be floats [M, L, D]"
        )
    return torch.from_numpy(np.array(array, dtype=np.float32))


def read_latents(path: Path, sample_shape: tuple[int, ...]) -> np.ndarray:
    """Latents [M, *sample_shape] of a .npy or .npz, mapped from the file where it is not compressed.

    Raises:
        BidmError: another shape, or values that are not finite.
    """
    name = _name(path)
    x0 = map_array(path) if name is None else load_npz_array(path, name)
    if x0.ndim != 4 or x0.shape[1:] != tuple(sample_shape) or not len(x0) or x0.dtype.kind != "f":
        raise BidmError(
            f"{path} holds {x0.dtype} {shape_text(x0.shape)}; as latents for this model it has "
            f"to hold floats {shape_text(('M', *sample_shape))}, as the network denoises them (scaled)"
        )
    if not all(np.isfinite(piece).all() for piece in x0):
        raise BidmError(f"{path} holds values that are not finite")
    return x0


def labels_in(path: Path, count: int) -> np.ndarray | None:
    """Labels [count] beside the latents of a .npz; None without any.

    Raises:
        BidmError: not ``count`` integers from 0.
    """
    name = _name(path, "labels", "arr_1")
    if name is None:
        return None
    labels = load_npz_array(path, name)
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or int(labels.min()) < 0:
        raise BidmError(f"{path} [{name}]: {count} samples need {count} integer labels from 0")
    return labels


def _name(path: Path, *names: str) -> str | None:
    """First of ``names`` (default: those of latents) among the arrays of a .npz; None for other files."""
    is_npz = path.suffix.lower() == ".npz" and zipfile.is_zipfile(path)
    keys = npz_keys(path) if is_npz else []
    return next((name for name in names or ("latents", "images", "arr_0") if name in keys), None)
