"""Training data: clean samples x0 from the user's images or latents, or the teacher's own (data-free).

data = ImageData(teacher, "digits.npz", ConditionSet())
x0, condition = data.batch(torch.tensor([3, 14, 15]), generator)  # latents or pixels [3, C, H, W], Condition
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.concat import image_shape
from bidm_cli.data.condition_files import ConditionSource, Model, gather
from bidm_cli.data.image_sets import fit, read_image_set, to_channels
from bidm_cli.diffusion.condition import Condition, ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.latents import holds_latents, labels_in, paired_context, read_latents
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Train
from bidm_cli.sampling.images import write_npy
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.sample import sample

CACHE_BYTES = 2 << 30
"""Encoded images are kept up to this size; beyond it they are encoded anew each time."""


def training_conditions(
    model: Model, source: ConditionSource, data: str | Path | None
) -> tuple[Model, ConditionSet]:
    """(the model, with the null context if one is given; conditions to train under, checked).

    A ``context`` in the .npz of ``data`` goes with its samples, where no other is given.

    Raises:
        BidmError: conditions that are missing, that cannot be read or that do not fit the model.
    """
    model, conditions = gather(model, source)
    if data is not None and conditions.context is None and model.context_width is not None:
        context = paired_context(data)
        if context is not None:
            conditions = replace(conditions, context=context, paired=True)
    if not model.embeds_labels or conditions.context is not None:
        labels = None if model.num_classes is None else torch.zeros(1, dtype=torch.long)
        model.check(labels, conditions.whole)
    null = model.null_context
    if conditions.context is not None and null is not None and null.shape[1] != conditions.context.shape[1]:
        raise BidmError(
            f"the unconditional context has {null.shape[1]} tokens, the contexts "
            f"{conditions.context.shape[1]}; training needs as many (`unconditional_context`)"
        )
    return model, conditions


class TrainingData(ABC):
    """Clean samples by number; labels and conditioning channels belong to a number, contexts are drawn.

    Args:
        count: number of samples. labels: [count], or None.
        conditions: contexts and channels; paired contexts go by number, too.
    """

    def __init__(
        self, model: DiffusionModel, count: int, labels: Tensor | None, conditions: ConditionSet
    ) -> None:
        self.model, self.count, self.labels, self.conditions = model, count, labels, conditions

    def __len__(self) -> int:
        return self.count

    @torch.no_grad()
    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """(x0 [N, C, H, W] as the network denoises them, their condition) for indices [N].

        ``generator`` draws what does not belong to one sample.
        """
        labels = None if self.labels is None else self.labels[indices]
        condition = self.model.make_condition(labels, self._conditions(indices, generator))
        return self._x0(indices).to(self.model.device), condition

    @abstractmethod
    def _x0(self, indices: Tensor) -> Tensor: ...

    def _conditions(self, indices: Tensor, generator: torch.Generator) -> Condition:
        others, context = self.conditions.take(indices), self.conditions.context
        if context is None or len(context) == 1 or self.conditions.paired:
            return others
        drawn = torch.randint(len(context), (len(indices),), generator=generator)
        return replace(others, context=context[drawn])


class _FileData(TrainingData):
    """Samples of a file or folder ``path``, with its ``labels`` [count] if there are any.

    Raises:
        BidmError: labels or ``conditions`` that do not fit the model or the samples.
    """

    def __init__(
        self,
        model: DiffusionModel,
        path: str | Path,
        count: int,
        labels: np.ndarray | None,
        conditions: ConditionSet,
    ) -> None:
        classes = None
        if model.num_classes is not None:
            if labels is None:
                raise BidmError(
                    f"{path}: the model is class-conditional and these images have no labels; put them into "
                    "one folder per class, give an .npz with labels, or use `synthetic`"
                )
            classes = torch.from_numpy(np.asarray(labels)).long()
            highest = int(classes.max())
            if highest >= model.num_classes:
                raise BidmError(
                    f"{path}: labels go up to {highest}, the model has {model.num_classes} classes"
                )
        super().__init__(model, count, classes, conditions)
        model.check(self.labels, conditions.whole)
        if conditions.concat is not None and len(conditions.concat) not in (1, count):
            raise BidmError(
                f"`condition` holds {len(conditions.concat)} conditions for {count} samples of `data`; give "
                "one for each, in the same order, or leave out `data`"
            )


class ImageData(_FileData):
    """Images of a folder, zip or npz: centre-cropped, resized, encoded by the first stage, cached.

    Raises:
        BidmError: nothing readable there, or as :class:`_FileData`.
    """

    def __init__(
        self, model: DiffusionModel, path: str | Path, conditions: ConditionSet = ConditionSet()
    ) -> None:
        self.images = read_image_set(path)
        self.channels, self.height, self.width = image_shape(model)
        super().__init__(model, path, len(self.images), self.images.labels, conditions)
        size = int(np.prod(model.sample_shape)) * 4
        self._cacheable = len(self.images) * size <= CACHE_BYTES
        self._cache: dict[int, Tensor] = {}

    def _x0(self, indices: Tensor) -> Tensor:
        wanted = indices.tolist()
        missing = [i for i in dict.fromkeys(wanted) if i not in self._cache]
        encoded: dict[int, Tensor] = {}
        if missing:
            pixels = torch.stack([self._pixels(i) for i in missing]).to(self.model.device)
            encoded = dict(zip(missing, self.model.encode(pixels), strict=True))
            if self._cacheable:
                self._cache.update(encoded)
        return torch.stack([encoded[i] if i in encoded else self._cache[i] for i in wanted])

    def _pixels(self, index: int) -> Tensor:
        """One image in [-1, 1], [channels, height, width]."""
        pixels = fit(to_channels(self.images[index], self.channels), self.height, self.width)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


class LatentData(_FileData):
    """Floats [M, C, H, W] of the network's own shape, taken as they are (DiT, U-ViT, or any model).

    ``path`` is a .npy, or a .npz with the latents and, for classes, labels [M].

    Raises:
        BidmError: another shape, values that are not finite, or as :class:`_FileData`.
    """

    def __init__(
        self, model: DiffusionModel, path: str | Path, conditions: ConditionSet = ConditionSet()
    ) -> None:
        self.latents = read_latents(Path(path), model.sample_shape)
        count = len(self.latents)
        super().__init__(model, path, count, labels_in(Path(path), count), conditions)

    def _x0(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.latents[indices.numpy()], dtype=np.float32))


class SyntheticData(TrainingData):
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
        generator, labels = torch.Generator().manual_seed(seed), None
        if model.num_classes is not None:
            labels = torch.randint(model.num_classes, (count,), generator=generator)
        super().__init__(model, count, labels, conditions)
        self.rows = torch.randint(max(1, len(conditions)), (count,), generator=generator)
        self.options = SamplingOptions(steps=steps, sampler="ddim", eta=0.0, seed=seed)
        pieces = []
        for first in range(0, count, self.PIECE):
            size = min(self.PIECE, count - first)
            file = folder / f"synthetic-{first:06d}.npy"
            if not file.is_file():
                write_npy(file, self._draw(first, size).cpu().numpy())
            pieces.append(torch.from_numpy(np.load(file, allow_pickle=False)))
            for _ in range(size):
                reporter.advance(None)
        self.x0 = torch.cat(pieces)

    def _draw(self, first: int, size: int) -> Tensor:
        """Samples ``first`` .. ``first + size - 1``."""
        piece = slice(first, first + size)
        condition = self.conditions.take(self.rows[piece])
        return sample(
            self.model,
            n=size,
            first=first,
            labels=None if self.labels is None else self.labels[piece],
            options=self.options,
            conditions=ConditionSource(context=condition.context, condition=condition.concat),
        )

    def _x0(self, indices: Tensor) -> Tensor:
        return self.x0[indices]

    def _conditions(self, indices: Tensor, generator: torch.Generator) -> Condition:
        return self.conditions.take(self.rows[indices])


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
