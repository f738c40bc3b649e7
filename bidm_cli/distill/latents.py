"""Training samples that are already what the network denoises: latents of DiT and U-ViT, or of any model.

data = LatentData(teacher, "latents.npz")       # floats [M, C, H, W], and labels [M] for classes
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.arrays import map_array
from bidm_cli.data.image_sets import load_npz_array, npz_header, npz_keys
from bidm_cli.diffusion.condition import Condition, ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.data import GivenConditions, labels_for
from bidm_cli.errors import BidmError

_NAMES = ("latents", "images", "arr_0")


def holds_latents(path: str | Path) -> bool:
    """Whether a data set is an array of floats rather than images: a .npy, or a .npz with one."""
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return path.is_file()
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    name = _name(path)
    return name == "latents" or (name is not None and npz_header(path, name)[1].kind == "f")


def paired_context(path: str | Path) -> Tensor | None:
    """The array ``context`` [M, L, D] of a .npz data set, a row a sample; None without one.

    Raises:
        BidmError: it is not that, or damaged.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path) or "context" not in npz_keys(path):
        return None
    array = load_npz_array(path, "context")
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise BidmError(
            f"{path} [context] is {array.dtype} {shape_text(array.shape)}; it has to be floats [M, L, D]"
        )
    return torch.from_numpy(np.array(array, dtype=np.float32))


class LatentData:
    """Floats [M, C, H, W] of the network's own shape, taken as they are.

    Args:
        rows: contexts and conditioning channels. paired: context k belongs to sample k.

    Raises:
        BidmError: another shape, values that are not finite, or labels or ``rows`` that do not fit the model.
    """

    def __init__(
        self,
        model: DiffusionModel,
        path: str | Path,
        rows: ConditionSet | None = None,
        paired: bool = False,
    ) -> None:
        path = Path(path)
        self.model, self.x0 = model, _load(path)
        wanted = tuple(model.sample_shape)
        if self.x0.ndim != 4 or self.x0.shape[1:] != wanted or not len(self.x0) or self.x0.dtype.kind != "f":
            raise BidmError(
                f"{path} holds {self.x0.dtype} {shape_text(self.x0.shape)}; as latents for this model it has "
                f"to hold floats {shape_text(('M', *wanted))}, as the network denoises them (scaled)"
            )
        if not all(np.isfinite(piece).all() for piece in self.x0):
            raise BidmError(f"{path} holds values that are not finite")
        labels = labels_for(model, _labels(path, len(self.x0)), path)
        self.given = GivenConditions(model, len(self.x0), labels, rows or ConditionSet(), paired)

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        x0 = torch.from_numpy(np.asarray(self.x0[indices.numpy()], dtype=np.float32))
        return x0.to(self.model.device), self.given.of(indices, generator)


def _load(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        name = _name(path)
        assert name is not None
        return load_npz_array(path, name)
    return map_array(path)


def _name(path: Path) -> str | None:
    keys = npz_keys(path)
    return next((name for name in _NAMES if name in keys), None)


def _labels(path: Path, count: int) -> np.ndarray | None:
    if path.suffix.lower() != ".npz":
        return None
    name = next((name for name in ("labels", "arr_1") if name in npz_keys(path)), None)
    if name is None:
        return None
    labels = load_npz_array(path, name)
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or int(labels.min()) < 0:
        raise BidmError(f"{path} [{name}]: {count} samples need {count} integer labels from 0")
    return labels
