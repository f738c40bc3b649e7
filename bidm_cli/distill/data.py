"""Training data: clean samples x0 from the user's images or latents, or the teacher's own (data-free).

data = open_data(teacher, DataOptions("faces.zip"), ConditionSet())
x0, condition = data.batch(torch.tensor([3, 14, 15]), generator)  # latents or pixels [3, C, H, W], Condition
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.array_images import holds_floats, max_value, sample_labels
from bidm_cli.data.condition_files import ConditionSource, Model, gather
from bidm_cli.data.summary import DataSummary
from bidm_cli.data.value_range import conversion, statistics_of_array, takes_pixels
from bidm_cli.diffusion.condition import Condition, ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.latents import paired_context, read_latents
from bidm_cli.distill.training_data import DataOptions, FileData, TrainingData
from bidm_cli.errors import BidmError
from bidm_cli.parallel.processes import Processes
from bidm_cli.parallel.share import Share
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Train
from bidm_cli.sampling.images import write_npy
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.sample import sample


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


class LatentData(FileData):
    """Floats [M, C, H, W] of the network's own shape: latents as they are, or pixels brought to [-1, 1].

    ``path`` is a .npy, or a .npz with the latents and, for classes, labels [M].

    Raises:
        BidmError: another shape, a range that is none of pixels, values that are not finite, or as
            :class:`FileData`.
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

    The processes of a run share the drawing out, piece by piece.

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
        processes: Processes | None = None,
    ) -> None:
        processes = processes or Processes()
        generator, labels = torch.Generator().manual_seed(seed), None
        if model.num_classes is not None:
            labels = torch.randint(model.num_classes, (count,), generator=generator)
        super().__init__(model, count, labels, conditions)
        self.summary = DataSummary("synthetic", None, count, size=f"{steps} DDIM steps")
        self.rows = torch.randint(max(1, len(conditions)), (count,), generator=generator)
        self.options = SamplingOptions(steps=steps, sampler="ddim", eta=0.0, seed=seed)
        files = {folder / f"synthetic-{first:06d}.npy": first for first in range(0, count, self.PIECE)}
        for number, (file, first) in enumerate(files.items()):
            size = min(self.PIECE, count - first)
            if number % processes.size == processes.rank and not file.is_file():
                write_npy(file, self._draw(first, size).cpu().numpy())
            for _ in range(size):
                reporter.advance(None)
        for file in files:
            processes.check_shared(file)
        self.x0 = torch.cat([torch.from_numpy(np.load(file, allow_pickle=False)) for file in files])

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

    def _conditions(self, indices: Tensor, generator: torch.Generator, share: Share) -> Condition:
        return self.conditions.take(self.rows[share.of(indices)])


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
    model: DiffusionModel,
    train: Train,
    conditions: ConditionSet,
    folder: Path,
    seed: int,
    reporter: Reporter,
    processes: Processes,
) -> SyntheticData:
    """Draw the samples of :func:`synthetic_plan`, or read those that ``folder`` holds."""
    count = synthetic_plan(model, train).count
    reporter.stage("draw training samples from the original", count)
    steps = min(train.synthetic_steps, model.schedule.timesteps)
    return SyntheticData(model, folder, count, steps, seed, reporter, conditions, processes)
