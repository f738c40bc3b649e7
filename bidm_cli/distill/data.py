"""Training data: clean samples x0 from the user's images or latents, or the teacher's own (data-free).

data = ImageData(teacher, "digits.npz", ConditionSet())
x0, condition = data.batch(torch.tensor([3, 14, 15]), generator)  # latents or pixels [3, C, H, W], Condition
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.array_images import digest_of_array, holds_floats, max_value, sample_labels
from bidm_cli.data.concat import image_shape
from bidm_cli.data.condition_files import ConditionSource, Model, gather
from bidm_cli.data.image_check import check_images
from bidm_cli.data.image_sets import FileImages, fit, read_image_set, to_channels
from bidm_cli.data.labels import Labels
from bidm_cli.data.summary import DataSummary, bad_text, sizes_text
from bidm_cli.data.value_range import conversion, statistics_of_array, takes_pixels
from bidm_cli.diffusion.condition import Condition, ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.latents import paired_context, read_latents
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Train
from bidm_cli.sampling.images import write_npy
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.sample import sample

CACHE_BYTES = 2 << 30
"""Encoded images are kept up to this size; beyond it they are encoded anew each time."""
UNREADABLE = 10
"""Images that may fail while they are decoded (or 1 % of them, if that is more) before training stops."""


@dataclass(frozen=True)
class DataOptions:
    """Training data, and how they are to be taken.

    Attributes:
        data: images (a folder, zip, .npz or .npy) or latents (an .npz or .npy of floats [M, C, H, W]) to
            distil on. None: data-free, x0 is sampled from the model.
        data_labels: class labels instead of the data's own: "folders" (class folders in sorted order),
            "names" (file names up to the first underscore), "imagenet" (folders named by ImageNet's
            wnids), or a file of labels (:mod:`bidm_cli.data.label_files`).
        data_range: "auto" converts floats from 0 to 1 and from 0 to 255 to the [-1, 1] of pixel models and
            refuses other ranges; "as-is" takes floats as they are.
        bad_images: "leave-out" or "refuse" files that cannot be used.
    """

    data: str | Path | None = None
    data_labels: str | Path | None = None
    data_range: Literal["auto", "as-is"] = "auto"
    bad_images: Literal["leave-out", "refuse"] = "leave-out"


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

    summary: DataSummary

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
    """Samples of a file or folder, with their labels where the model has classes.

    Raises:
        BidmError: labels or ``conditions`` that do not fit the model or the samples.
    """

    def __init__(
        self, model: DiffusionModel, summary: DataSummary, labels: Labels, conditions: ConditionSet
    ) -> None:
        path, count, classes = summary.path, summary.count, None
        if model.num_classes is not None:
            numbers, text = labels.of_model(model.num_classes, model.null_label, str(path))
            classes = torch.from_numpy(numbers)
            digest = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
            summary = replace(summary, classes=text, labels=labels.source, labels_digest=digest)
        super().__init__(model, count, classes, conditions)
        self.summary = summary
        model.check(self.labels, conditions.whole)
        if conditions.concat is not None and len(conditions.concat) not in (1, count):
            raise BidmError(
                f"`condition` holds {len(conditions.concat)} conditions for {count} samples of `data`; give "
                "one for each, in the same order, or leave out `data`"
            )


class ImageData(_FileData):
    """Images of a folder, zip or npz: centre-cropped, resized, encoded by the first stage, cached.

    All files are looked at first, and those that cannot be used are left out or refused. One that only fails
    when it is decoded is left out then: the next one that can be read takes its place.

    Raises:
        BidmError: nothing readable there, or as :class:`_FileData`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        path: str | Path,
        conditions: ConditionSet = ConditionSet(),
        options: DataOptions = DataOptions(),
        reporter: Reporter = Reporter(),
    ) -> None:
        self.images = read_image_set(path, options.data_labels)
        self.channels, self.height, self.width = image_shape(model)
        self.options, self.reporter = options, reporter
        summary = DataSummary("images", Path(path), len(self.images), values="0 to 255 scaled to [-1, 1]")
        if isinstance(self.images, FileImages):
            summary, conditions = self._look(self.images, summary, conditions)
        else:
            first = self.images[0].shape
            summary = replace(summary, size=f"{first[1]}x{first[0]}", digest=digest_of_array(Path(path)))
        summary = replace(summary, notes=(*self.images.notes, *summary.notes))
        super().__init__(model, summary, self.images.labelling, conditions)
        size = int(np.prod(model.sample_shape)) * 4
        self._cacheable = len(self.images) * size <= CACHE_BYTES
        self._cache: dict[int, Tensor] = {}
        self._unreadable: set[int] = set()

    def _look(
        self, images: FileImages, summary: DataSummary, conditions: ConditionSet
    ) -> tuple[DataSummary, ConditionSet]:
        """Look at all files and leave out those that cannot be used, and their conditions with them."""
        check = check_images(images, self.reporter)
        if check.bad and self.options.bad_images == "refuse":
            raise BidmError(
                f"{summary.path}: {len(check.bad):,} of {len(images):,} images cannot be used: "
                f"{bad_text(check.bad)}; mend or remove them, or leave them out (`bad_images`=leave-out)"
            )
        if not len(check.kept):
            raise BidmError(
                f"{summary.path}: none of {len(images):,} images can be used: {bad_text(check.bad)}"
            )
        concat = conditions.concat
        if check.bad and concat is not None and len(concat) == len(images) > 1:
            conditions = replace(conditions, concat=concat[torch.from_numpy(check.kept)])
        self.images = images.keep(check.kept)
        turned = f"{check.turned:,} turned upright by their EXIF orientation" if check.turned else ""
        return replace(
            summary,
            count=len(check.kept),
            size=sizes_text(check.sizes),
            digest=check.digest(),
            left_out=check.bad,
            notes=(turned,) if turned else (),
        ), conditions

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
        pixels = fit(to_channels(self._readable(index), self.channels), self.height, self.width)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1

    def _readable(self, index: int) -> np.ndarray:
        """Image ``index``, or the next one that can be read."""
        count = len(self.images)
        for i in (number % count for number in range(index, index + count)):
            if i in self._unreadable:
                continue
            try:
                return self.images[i]
            except BidmError as error:
                if self.options.bad_images == "refuse":
                    raise BidmError(f"{error} (`bad_images`=leave-out does without it)") from error
                self._unreadable.add(i)
                if len(self._unreadable) > max(UNREADABLE, count // 100):
                    raise BidmError(f"{error}; {len(self._unreadable)} images fail by now") from error
                self.reporter.say(f"Left out from here on: {error}; the next image takes its place")
        raise BidmError(f"{self.summary.path}: no image can be read any more")


class LatentData(_FileData):
    """Floats [M, C, H, W] of the network's own shape: latents as they are, or pixels brought to [-1, 1].

    ``path`` is a .npy, or a .npz with the latents and, for classes, labels [M].

    Raises:
        BidmError: another shape, a range that is none of pixels, values that are not finite, or as
            :class:`_FileData`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        path: str | Path,
        conditions: ConditionSet = ConditionSet(),
        options: DataOptions = DataOptions(),
    ) -> None:
        path = Path(path)
        chosen, self.latents, layout = read_latents(path, model.sample_shape)
        count = len(self.latents)
        found = statistics_of_array(self.latents, path)
        self.conversion = conversion(found, model, str(path), options.data_range == "as-is", max_value(path))
        summary = DataSummary(
            "arrays" if takes_pixels(model) else "latents",
            path,
            count,
            size=shape_text(model.sample_shape) + layout,
            values=self.conversion.text,
            conversion=(self.conversion.factor, self.conversion.offset),
            digest=f"{found.digest:08x}",
            notes=(*chosen.notes, *self.conversion.notes),
        )
        super().__init__(model, summary, sample_labels(path, count, options.data_labels), conditions)

    def _x0(self, indices: Tensor) -> Tensor:
        x0 = np.asarray(self.latents[indices.numpy()], dtype=np.float32)
        if (self.conversion.factor, self.conversion.offset) != (1.0, 0.0):
            x0 = x0 * np.float32(self.conversion.factor) + np.float32(self.conversion.offset)
        return torch.from_numpy(np.ascontiguousarray(x0))


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
        self.summary = DataSummary("synthetic", None, count, size=f"{steps} DDIM steps")
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
    model: DiffusionModel, options: DataOptions, conditions: ConditionSet, reporter: Reporter = Reporter()
) -> ImageData | LatentData | None:
    """Images or latents that the user names; None without any. Nothing is written but to the user's cache.

    Raises:
        BidmError: data that cannot be read or that does not fit the model.
    """
    path = options.data
    if path is None:
        return None
    if conditions.context is not None:
        how = "each sample has its own" if conditions.paired else "drawn independently of the samples"
        reporter.say(f"{len(conditions.context)} contexts, {how}")
    if holds_floats(Path(path)):
        return LatentData(model, path, conditions, options)
    return ImageData(model, path, conditions, options, reporter)


def synthetic_plan(model: DiffusionModel, train: Train) -> DataSummary:
    """Data of a run without any of the user's: as many of the model's samples as training can use."""
    count = min(train.synthetic_images, max(1, train.steps * train.batch_size))
    steps = min(train.synthetic_steps, model.schedule.timesteps)
    return DataSummary("synthetic", None, count, size=f"{steps} DDIM steps")


def draw_synthetic(
    model: DiffusionModel, train: Train, conditions: ConditionSet, folder: Path, seed: int, reporter: Reporter
) -> SyntheticData:
    """Draw the samples of :func:`synthetic_plan`, or read those that ``folder`` holds."""
    count = synthetic_plan(model, train).count
    reporter.stage("draw training samples from the original", count)
    steps = min(train.synthetic_steps, model.schedule.timesteps)
    return SyntheticData(model, folder, count, steps, seed, reporter, conditions)
