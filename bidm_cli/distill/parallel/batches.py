"""Batches of a training: drawn whole from (seed, step), of which a process takes its share in micro-batches.

The random choices of a step are made for its whole batch in every process, so a run is the same, up to the
order of float sums, for any number of processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from bidm_cli.diffusion.condition import Condition
from bidm_cli.distill.objective import Draws, Objective, TeacherTargets
from bidm_cli.distill.training_data import TrainingData
from bidm_cli.errors import BidmError
from bidm_cli.parallel.share import Share
from bidm_cli.recipe import Optimization


@dataclass(frozen=True)
class _Step:
    """A process's share of one step."""

    number: int
    x0: Tensor
    condition: Condition
    draws: Draws


class Batches:
    """Teacher targets of micro-batches 0, 1, ...; each step has ``train.accumulate`` of them.

    Args:
        share: of this process. autocast: makes the context in which the teacher computes.

    Raises:
        BidmError: a batch too small for every process and micro-batch to have a row of it.
    """

    def __init__(
        self,
        data: TrainingData,
        objective: Objective,
        settings: Optimization,
        seed: int,
        share: Share,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.data, self.objective, self.settings, self.seed = data, objective, settings, seed
        self.share, self._autocast = share, autocast
        self._open: _Step | None = None
        parts = share.count * settings.accumulate
        if settings.batch_size < parts:
            sharers = [f"{share.count} processes"] if share.count > 1 else []
            sharers += [f"{settings.accumulate} micro-batches"] if settings.accumulate > 1 else []
            raise BidmError(
                f"a batch of {settings.batch_size} images is too small for {' of '.join(sharers)}; "
                f"use a `batch_size` of {parts} or more"
            )

    def targets(self, number: int) -> TeacherTargets:
        """Teacher's half of micro-batch ``number``; from one thread at a time, best in order."""
        step, part = divmod(number, self.settings.accumulate)
        if self._open is None or self._open.number != step:
            self._open = self._draw(step)
        share, own = Share(part, self.settings.accumulate), self._open
        with self._autocast():
            return self.objective.prepare(
                share.of(own.x0), own.condition.map(share.of), own.draws.rows(share)
            )

    def weight(self, targets: TeacherTargets) -> float:
        """Share of the step's batch that a micro-batch is, which its mean losses count for."""
        return len(targets.x) / self.settings.batch_size

    def _draw(self, step: int) -> _Step:
        indices, generator = self._indices(step)
        x0, condition = self.data.batch(indices, generator, self.share)
        if step + 1 < self.settings.steps:
            self.data.expect(self.share.of(self._indices(step + 1)[0]))
        draws = self.objective.draws(len(indices), condition, generator)
        return _Step(step, x0, condition, draws.rows(self.share))

    def _indices(self, step: int) -> tuple[Tensor, torch.Generator]:
        """(numbers [N] of a step's samples, generator of all that follows)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shape = (self.settings.batch_size,)
        return torch.randint(len(self.data), shape, generator=generator), generator
