"""What one training step compares: student and teacher at x_t, with the step before as the sampler sees it.

objective = Objective(teacher, student, recipe)
losses = objective(x0, teacher.given(labels), generator)
losses.total.backward()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bidm_cli.binary.surgery import select_blocks
from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.model import DiffusionModel, Memory
from bidm_cli.distill.features import FeatureTap
from bidm_cli.distill.spd import FeatureMSE, SpacePatchedDistillation
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.prediction import estimate
from bidm_cli.sampling.sample import clipping

NULL_LABEL_RATE = 0.1
"""How often a condition becomes the null label or context in training, so that guidance works (arXiv
2207.12598)."""


@dataclass
class Losses:
    """Scalars of one step: ``total = noise + weight * feature``."""

    total: Tensor
    noise: Tensor
    feature: Tensor


@dataclass
class _Batch:
    """x_t and what the student carries into it. ``fresh`` [N] marks rows without a step before."""

    x: Tensor
    t: Tensor
    noise: Tensor
    memory: Memory | None
    fresh: Tensor | None


class Objective:
    """Noise-prediction loss plus weighted feature loss (BiDM, eq. 12; total = noise + lambda SPD).

    Args:
        teacher: the original model. student: the same with a binarized network.
    """

    def __init__(self, teacher: DiffusionModel, student: DiffusionModel, recipe: Recipe) -> None:
        self.teacher, self.student, self.recipe = teacher, student, recipe
        self.connected = getattr(student.unet, "connections", None) is not None
        self.stride = connection_stride(recipe, teacher.schedule.timesteps)
        self.feature_loss: SpacePatchedDistillation | FeatureMSE | None = None
        if recipe.distill.loss != "none" and recipe.distill.weight > 0:
            names = select_blocks(teacher.unet, recipe.distill.features, recipe.where("distill"))
            self.teacher_tap = FeatureTap(teacher.unet, names)
            self.student_tap = FeatureTap(student.unet, names)
            spd = recipe.distill.loss == "spd"
            self.feature_loss = SpacePatchedDistillation(recipe.distill.patches) if spd else FeatureMSE()

    def __call__(self, x0: Tensor, given: Condition, generator: torch.Generator) -> Losses:
        """Losses for clean samples x0 [N, C, H, W] and their conditions.

        ``generator`` decides all randomness.
        """
        told = self._condition(given, generator)
        batch = self._batch(x0, told, generator)
        with torch.no_grad():
            wanted = self.teacher.denoise(told.join(batch.x), batch.t, told.context, told.y)
            teacher_features = self.teacher_tap.take() if self.feature_loss else []
        output = self._student(batch.x, batch.t, told, batch.memory, batch.fresh)
        if self.recipe.distill.target == "noise":
            wanted = self._noise_target(x0, batch)
            output_compared = output[:, : wanted.shape[1]]
        else:
            output_compared = output
        noise = (output_compared.float() - wanted.float()).square().mean()
        feature = noise.new_zeros(())
        if self.feature_loss is not None:
            feature = self.feature_loss(self.student_tap.take(), teacher_features)
        return Losses(noise + self.recipe.distill.weight * feature, noise, feature)

    def _condition(self, given: Condition, generator: torch.Generator) -> Condition:
        """``given`` with some rows' label or context dropped, where the model knows what none is."""
        droppable = given.context if given.y is None else given.y
        if droppable is None or (self.teacher.null_label is None and self.teacher.null_context is None):
            return given
        dropped = torch.rand(len(droppable), generator=generator) < NULL_LABEL_RATE
        with torch.no_grad():
            return given.mixed(self.teacher.unconditional(given), dropped)

    def _batch(self, x0: Tensor, told: Condition, generator: torch.Generator) -> _Batch:
        schedule = self.teacher.schedule
        t = torch.randint(schedule.timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        if not self.connected:
            return _Batch(schedule.add_noise(x0, noise, t), t.to(x0.device), noise, None, None)
        plain = self.recipe.tbs.plain if self.recipe.tbs else 0.0
        fresh = torch.rand(len(x0), generator=generator) < plain
        fresh |= t + self.stride >= schedule.timesteps
        before = (t + self.stride).clamp(max=schedule.timesteps - 1)
        x_before = schedule.add_noise(x0, noise, before)
        pair = self.recipe.tbs.pair if self.recipe.tbs else "ddim"
        if pair == "ddim":
            x = self._sampler_step(x_before, before, t, told)
            first = fresh.reshape(-1, 1, 1, 1).to(x0.device)
            x = torch.where(first, schedule.add_noise(x0, noise, t), x)
        else:
            if pair == "independent":
                noise = torch.randn(x0.shape, generator=generator).to(x0)
            x = schedule.add_noise(x0, noise, t)
        memory: Memory = {}
        with torch.no_grad():
            self._student(x_before, before.to(x0.device), told, memory, None)
            if self.feature_loss is not None:
                self.student_tap.take()
        return _Batch(x, t.to(x0.device), noise, memory, fresh.to(x0.device))

    @torch.no_grad()
    def _sampler_step(self, x: Tensor, t: Tensor, to: Tensor, told: Condition) -> Tensor:
        """One deterministic DDIM step (arXiv 2010.02502, eq. 12) with the teacher's prediction."""
        output = self.teacher.denoise(told.join(x), t.to(x.device), told.context, told.y)
        if self.feature_loss is not None:
            self.teacher_tap.take()
        # Binarized pixel models are sampled with x0 clipped; the pairs they are trained on follow.
        clip = clipping(self.student)
        schedule = self.teacher.schedule
        seen = estimate(self.teacher.prediction, x, output, schedule.at(t, x), clip)
        ab = schedule.at(to, x)
        return ab.sqrt() * seen.x0 + (1 - ab).sqrt() * seen.eps

    def _student(
        self,
        x: Tensor,
        t: Tensor,
        told: Condition,
        memory: Memory | None,
        fresh: Tensor | None,
    ) -> Tensor:
        x = told.join(x)
        if memory is None or not self.connected:
            return self.student.denoise(x, t, told.context, told.y)
        with self.student.unet.connections.carrying(t, memory, fresh):  # type: ignore[operator, union-attr]
            return self.student.unet(x, self.student.network_time(t), told.context, told.y)

    def _noise_target(self, x0: Tensor, batch: _Batch) -> Tensor:
        """What the network should have said knowing x0: the noise in x_t, or x0 or v made of it."""
        ab = self.teacher.schedule.at(batch.t, x0)
        noise = (batch.x - ab.sqrt() * x0) / (1 - ab).sqrt()
        if self.teacher.prediction == "x0":
            return x0
        if self.teacher.prediction == "v":
            return ab.sqrt() * noise - (1 - ab).sqrt() * x0
        return noise


def connection_stride(recipe: Recipe, timesteps: int) -> int:
    """Timesteps between h_prev and h_t in training: the sampler's own, or the recipe's number."""
    if recipe.tbs is None or recipe.tbs.stride == "sampler":
        return max(1, timesteps // max(1, recipe.sampler.steps))
    return int(recipe.tbs.stride)
