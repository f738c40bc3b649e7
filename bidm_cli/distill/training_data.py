"""Training data by number: clean samples x0 with their conditions, and how a user's data are to be taken."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bidm_cli.data.labels import Labels
from bidm_cli.data.summary import DataSummary
from bidm_cli.diffusion.condition import Condition, ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.parallel.share import WHOLE, Share
from bidm_cli.transfer import to_device


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
        latents_cache: keep the latents of images on disk (:mod:`bidm_cli.distill.latents_cache`).
    """

    data: str | Path | None = None
    data_labels: str | Path | None = None
    data_range: Literal["auto", "as-is"] = "auto"
    bad_images: Literal["leave-out", "refuse"] = "leave-out"
    latents_cache: bool = True


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
    def batch(
        self, indices: Tensor, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Tensor, Condition]:
        """(x0 [M, C, H, W] as the network denoises them, their condition) for the M rows of ``share``.

        Args:
            indices: [N], of the whole batch. generator: draws what does not belong to one sample, for all N.
        """
        others, indices = self._conditions(indices, generator, share), share.of(indices)
        labels = None if self.labels is None else self.labels[indices]
        condition = self.model.make_condition(labels, others)
        return to_device(self._x0(indices), self.model.device), condition

    def expect(self, indices: Tensor) -> None:  # noqa: B027
        """Begin to read what the next :meth:`batch` needs, where reading takes time."""

    @abstractmethod
    def _x0(self, indices: Tensor) -> Tensor: ...

    def _conditions(self, indices: Tensor, generator: torch.Generator, share: Share) -> Condition:
        others, context = self.conditions.take(share.of(indices)), self.conditions.context
        if context is None or len(context) == 1 or self.conditions.paired:
            return others
        drawn = torch.randint(len(context), (len(indices),), generator=generator)
        return replace(others, context=context[share.of(drawn)])


class FileData(TrainingData):
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
