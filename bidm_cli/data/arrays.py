"""Arrays of numbers from .npy, .npz and .safetensors files, which are never trusted."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bidm_cli.data.npz import load_npz_array, npz_keys
from bidm_cli.errors import BidmError, first_line

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")


def read_array(path: str | Path, option: str, names: Sequence[str]) -> Tensor:
    """Array of a .npy, or the one of ``names``, or the only one, of a .npz or .safetensors.

    Raises:
        BidmError: no such file, another kind of file, no or several arrays to choose from, or damage.
    """
    path = Path(path)
    if not path.is_file():
        raise BidmError(f"{path}: no such file ({option})")
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise BidmError(f"{path}: {option} takes arrays, {', '.join(ARRAY_SUFFIXES)}")
    try:
        if suffix == ".npy":
            return _tensor(map_array(path), path)
        if suffix == ".npz":
            return _tensor(load_npz_array(path, _choose(path, npz_keys(path), option, names)), path)
        with safe_open(str(path), framework="pt") as handle:
            return handle.get_tensor(_choose(path, list(handle.keys()), option, names)).clone()
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, SafetensorError) as error:
        raise BidmError(f"{path} ({option}) is damaged or holds no array: {first_line(error)}") from error


def map_array(path: Path) -> np.ndarray:
    """Numbers of a .npy, mapped from the file.

    Raises:
        BidmError: no such file, another kind of file, pickled objects, or damage.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy's header goes through Python's own parser, whatever that raises
        raise BidmError(f"{path} is not a .npy file of numbers, or damaged: {first_line(error)}") from error
    if not isinstance(array, np.ndarray):
        raise BidmError(f"{path} is a .npz file by its content; give it that name")
    return array


def _choose(path: Path, found: list[str], option: str, names: Sequence[str]) -> str:
    chosen = next((name for name in names if name in found), found[0] if len(found) == 1 else None)
    if chosen is None:
        raise BidmError(
            f"{path} ({option}) holds the arrays {', '.join(sorted(found)[:8]) or 'none'}; call the one "
            f"to use {names[0]!r}"
        )
    return chosen


def _tensor(array: np.ndarray, path: Path) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise BidmError(f"{path} holds {array.dtype}, not numbers")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))
