"""Conditions of a training run: gathered, paired with the data set's own contexts, checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bidm_cli.data.condition_files import ConditionSource, Model, gather
from bidm_cli.diffusion.condition import Condition, ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.latents import paired_context
from bidm_cli.errors import BidmError


def training_conditions(
    model: Model, source: ConditionSource, data: str | Path | None
) -> tuple[Model, ConditionSet]:
    """(the model, with the null context if one is given; conditions to train under).

    A ``context`` in the .npz of ``data`` goes with its samples, where no other is given.

    Raises:
        BidmError: conditions that are missing, that cannot be read or that do not fit the model.
    """
    model, conditions = gather(model, source)
    if data is not None and conditions.context is None and model.context_width is not None:
        context = paired_context(data)
        if context is not None:
            conditions = replace(conditions, context=context, paired=True)
    _check(model, conditions)
    return model, conditions


def _check(model: DiffusionModel, conditions: ConditionSet) -> None:
    """Raise BidmError for what can be seen of the conditions before anything is written."""
    if not model.embeds_labels or conditions.context is not None:
        labels = None if model.num_classes is None else torch.zeros(1, dtype=torch.long)
        model.check(labels, conditions.whole)
    null = model.null_context
    if conditions.context is not None and null is not None and null.shape[1] != conditions.context.shape[1]:
        raise BidmError(
            f"the unconditional context has {null.shape[1]} tokens, the contexts "
            f"{conditions.context.shape[1]}; training needs as many (--unconditional-context)"
        )


class SampleConditions:
    """Conditions of a data set's samples: labels and channels by the sample's number, contexts at random.

    Args:
        labels: [M], or None. conditions: contexts and channels; paired contexts go by number, too.

    Raises:
        BidmError: they do not fit the model or the ``count`` samples.
    """

    def __init__(
        self, model: DiffusionModel, count: int, labels: Tensor | None, conditions: ConditionSet
    ) -> None:
        model.check(labels, conditions.whole)
        if conditions.concat is not None and len(conditions.concat) not in (1, count):
            raise BidmError(
                f"--condition holds {len(conditions.concat)} conditions for {count} samples of --data; give "
                "one for each, in the same order, or leave out --data"
            )
        self.model, self.labels, self.conditions = model, labels, conditions

    @torch.no_grad()
    def of(self, indices: Tensor, generator: torch.Generator) -> Condition:
        """Condition of samples ``indices`` [N], on the model's device."""
        others, context = self.conditions.take(indices), self.conditions.context
        if context is not None and len(context) > 1 and not self.conditions.paired:
            drawn = torch.randint(len(context), (len(indices),), generator=generator)
            others = replace(others, context=context[drawn])
        return self.model.make_condition(None if self.labels is None else self.labels[indices], others)
