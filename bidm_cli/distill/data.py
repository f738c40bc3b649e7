"""Training data: clean samples x0 from the user's images or latents, or the teacher's own (data-free).

data = ImageData(teacher, "digits.npz", ConditionSet())
x0, condition = data.batch(torch.tensor([3, 14, 15]), generator)  # latents or pixels [3, C, H, W], Condition
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.concat import image_shape
from bidm_cli.data.condition_files import ConditionSource
from bidm_cli.data.image_sets import fit, read_image_set, to_channels
from bidm_cli.diffusion.condition import Condition, ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.conditions import SampleConditions
from bidm_cli.distill.latents import holds_latents, labels_in, read_latents
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Train
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.sample import sample

CACHE_BYTES = 2 << 30
"""Encoded images are kept up to this much memory; beyond it they are encoded anew each time."""


class TrainingData(Protocol):
    """Clean samples by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """(x0 [N, C, H, W] as the network denoises them, their condition) for indices [N].

        ``generator`` draws what does not belong to one sample.
        """
        ...


class ImageData:
    """Images of a folder, zip or npz: centre-cropped, resized, encoded by the first stage, cached.

    Args:
        conditions: contexts and conditioning channels.

    Raises:
        BidmError: nothing readable there, or labels or ``conditions`` that do not fit the model.
    """

    def __init__(
        self, model: DiffusionModel, path: str | Path, conditions: ConditionSet = ConditionSet()
    ) -> None:
        self.model, self.images = model, read_image_set(path)
        self.channels, self.height, self.width = image_shape(model)
        labels = labels_for(model, self.images.labels, path)
        self.conditions = SampleConditions(model, len(self.images), labels, conditions)
        size = int(np.prod(model.sample_shape)) * 4
        self._cacheable = len(self.images) * size <= CACHE_BYTES
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        wanted = indices.tolist()
        missing = [i for i in dict.fromkeys(wanted) if i not in self._cache]
        encoded: dict[int, Tensor] = {}
        if missing:
            pixels = torch.stack([self._pixels(i) for i in missing]).to(self.model.device)
            encoded = dict(zip(missing, self.model.encode(pixels), strict=True))
            if self._cacheable:
                self._cache.update(encoded)
        x0 = torch.stack([encoded[i] if i in encoded else self._cache[i] for i in wanted])
        return x0, self.conditions.of(indices, generator)

    def _pixels(self, index: int) -> Tensor:
        """One image in [-1, 1], [channels, height, width]."""
        pixels = to_channels(self.images[index], self.channels)
        pixels = fit(pixels, self.height, self.width)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


class LatentData:
    """Floats [M, C, H, W] of the network's own shape, taken as they are (DiT, U-ViT, or any model).

    Args:
        path: a .npy, or a .npz with the latents and, for classes, labels [M].
        conditions: contexts and conditioning channels.

    Raises:
        BidmError: another shape, values that are not finite, or labels or ``conditions`` that do not fit.
    """

    def __init__(
        self, model: DiffusionModel, path: str | Path, conditions: ConditionSet = ConditionSet()
    ) -> None:
        self.model, self.x0 = model, read_latents(Path(path), model.sample_shape)
        labels = labels_for(model, labels_in(Path(path), len(self.x0)), path)
        self.conditions = SampleConditions(model, len(self.x0), labels, conditions)

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        x0 = torch.from_numpy(np.asarray(self.x0[indices.numpy()], dtype=np.float32))
        return x0.to(self.model.device), self.conditions.of(indices, generator)


def labels_for(model: DiffusionModel, found: np.ndarray | None, path: str | Path) -> Tensor | None:
    """Labels of a data set as the model takes them, [M]; None for models without classes.

    Raises:
        BidmError: there are none, or they go beyond the model's classes.
    """
    if model.num_classes is None:
        return None
    if found is None:
        raise BidmError(
            f"{path}: the model is class-conditional and these images have no labels; put them into "
            "one folder per class, give an .npz with labels, or use --synthetic"
        )
    labels = torch.from_numpy(np.asarray(found)).long()
    if int(labels.max()) >= model.num_classes:
        raise BidmError(
            f"{path}: labels go up to {int(labels.max())}, the model has {model.num_classes} classes"
        )
    return labels


class SyntheticData:
    """The teacher's own samples, drawn once and kept in the run's folder; a rerun continues drawing.

    Args:
        folder: where the pieces are written. count: number of samples. steps: DDIM steps for each.
        reporter: advanced by one per sample.
        conditions: contexts and channels; sample k is drawn, and trained on, under a row drawn for it.
    """

    PIECE = 64

    def __init__(
        self,
        model: DiffusionModel,
        folder: Path,
        count: int,
        steps: int,
        seed: int,
        reporter: Reporter = Reporter(),
        conditions: ConditionSet = ConditionSet(),
    ) -> None:
        self.model, self.conditions, self.labels = model, conditions, None
        generator = torch.Generator().manual_seed(seed)
        if model.num_classes is not None:
            self.labels = torch.randint(model.num_classes, (count,), generator=generator)
        self.rows = torch.randint(max(1, len(conditions)), (count,), generator=generator)
        self.options = SamplingOptions(steps=steps, sampler="ddim", eta=0.0, seed=seed)
        pieces = []
        for first in range(0, count, self.PIECE):
            size = min(self.PIECE, count - first)
            file = folder / f"synthetic-{first:06d}.npy"
            if not file.is_file():
                with write_atomically(file) as temporary:
                    np.save(temporary, self._draw(first, size).cpu().numpy())
            pieces.append(torch.from_numpy(np.load(file, allow_pickle=False)))
            for _ in range(size):
                reporter.advance(None)
        self.x0 = torch.cat(pieces)

    def _draw(self, first: int, size: int) -> Tensor:
        """Samples ``first`` .. ``first + size - 1``."""
        piece = slice(first, first + size)
        drawn_under = self.conditions.take(self.rows[piece])
        return sample(
            self.model,
            n=size,
            first=first,
            labels=None if self.labels is None else self.labels[piece],
            options=self.options,
            conditions=ConditionSource(context=drawn_under.context, condition=drawn_under.concat),
        )

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        labels = None if self.labels is None else self.labels[indices]
        with torch.no_grad():
            condition = self.model.make_condition(labels, self.conditions.take(self.rows[indices]))
        return self.x0[indices].to(self.model.device), condition


def open_data(
    model: DiffusionModel,
    train: Train,
    path: str | Path | None,
    conditions: ConditionSet,
    folder: Path,
    seed: int,
    reporter: Reporter,
) -> TrainingData:
    """Images or latents from ``path``; without one, as many of the model's samples as training can use.

    Raises:
        BidmError: data that cannot be read or that does not fit the model.
    """
    if path is None:
        count = min(train.synthetic_images, max(1, train.steps * train.batch_size))
        reporter.stage("draw training samples from the original", count)
        steps = min(train.synthetic_steps, model.schedule.timesteps)
        return SyntheticData(model, folder, count, steps, seed, reporter, conditions)
    if conditions.context is not None:
        how = "each sample has its own" if conditions.paired else "drawn independently of the samples"
        reporter.say(f"{len(conditions.context)} contexts, {how}")
    if not holds_latents(path):
        return ImageData(model, path, conditions)
    latents = LatentData(model, path, conditions)
    reporter.say(f"{path}: taken as {len(latents)} latents {shape_text(model.sample_shape)}")
    return latents
