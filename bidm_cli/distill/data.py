"""Where clean samples x0 come from: images given by the user, or the teacher's own samples (data-free).

data = open_data(teacher, "digits.npz")
x0, labels = data.batch(torch.tensor([3, 14, 15]))      # latents or pixels [3, C, H, W], labels [3] or None
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bidm_cli.diffusion.image_sets import ImageSet, read_image_set, to_channels
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.networks.registry import build
from bidm_cli.sampling.sample import sample

CACHE_BYTES = 2 << 30
"""Encoded images are kept up to this much memory; beyond it they are encoded anew each time."""


class TrainingData(Protocol):
    """Clean samples by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x0 [N, C, H, W] as the network denoises them, labels [N] or None) for indices [N]."""
        ...


class ImageData:
    """Images of a folder, zip or npz: centre-cropped, resized, encoded by the first stage, cached.

    Raises:
        BidmError: nothing readable there, or labels that do not fit the model.
    """

    def __init__(self, model: DiffusionModel, path: str | Path) -> None:
        self.model, self.images = model, read_image_set(path)
        self.channels, self.height, self.width = image_shape(model)
        self.labels = _labels_for(model, self.images)
        size = int(np.prod(model.sample_shape)) * 4
        self._cacheable = len(self.images) * size <= CACHE_BYTES
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        wanted = indices.tolist()
        missing = [i for i in dict.fromkeys(wanted) if i not in self._cache]
        found: dict[int, Tensor] = {}
        if missing:
            pixels = torch.stack([self._pixels(i) for i in missing]).to(self.model.device)
            found = dict(zip(missing, self.model.encode(pixels), strict=True))
            if self._cacheable:
                self._cache.update(found)
        x0 = torch.stack([found[i] if i in found else self._cache[i] for i in wanted])
        return x0, None if self.labels is None else self.labels[indices]

    def _pixels(self, index: int) -> Tensor:
        """One image in [-1, 1], [channels, height, width]."""
        pixels = to_channels(self.images[index], self.channels)
        pixels = _fit(pixels, self.height, self.width)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def _fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
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


def _labels_for(model: DiffusionModel, images: ImageSet) -> Tensor | None:
    if model.num_classes is None:
        return None
    if images.labels is None:
        raise BidmError(
            f"{images.path}: the model is class-conditional and these images have no labels; put them into "
            "one folder per class, give an .npz with labels, or use --synthetic"
        )
    labels = torch.from_numpy(np.asarray(images.labels)).long()
    if int(labels.max()) >= model.num_classes:
        raise BidmError(
            f"{images.path}: labels go up to {int(labels.max())}, the model has {model.num_classes} classes"
        )
    return labels


def image_shape(model: DiffusionModel) -> tuple[int, int, int]:
    """(channels, height, width) of the model's images."""
    if model.first_stage is None:
        return model.sample_shape
    with torch.device("meta"):
        stage = build(model.architecture["first_stage"])
        decoded = stage.decode(torch.empty(1, *model.sample_shape))  # type: ignore[operator]
    return int(decoded.shape[1]), int(decoded.shape[2]), int(decoded.shape[3])


class SyntheticData:
    """The teacher's own samples, drawn once and kept in the run's folder; a rerun continues drawing.

    Args:
        folder: where the pieces are written. count: how many samples. steps: DDIM steps for each.
        progress: called with the number drawn so far.
    """

    PIECE = 64

    def __init__(
        self,
        model: DiffusionModel,
        folder: Path,
        count: int,
        steps: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        labels = None
        if model.num_classes is not None:
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randint(model.num_classes, (count,), generator=generator)
        self.labels, pieces = labels, []
        for first in range(0, count, self.PIECE):
            size = min(self.PIECE, count - first)
            file = folder / f"synthetic-{first:06d}.npy"
            if not file.is_file():
                x0 = sample(
                    model,
                    n=size,
                    first=first,
                    steps=steps,
                    seed=seed,
                    labels=None if labels is None else labels[first : first + size],
                )
                with write_atomically(file) as temporary:
                    np.save(temporary, x0.cpu().numpy())
            pieces.append(torch.from_numpy(np.load(file, allow_pickle=False)))
            if progress is not None:
                progress(first + size, count)
        self.x0, self.device = torch.cat(pieces), model.device

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.x0[indices].to(self.device), None if self.labels is None else self.labels[indices]
