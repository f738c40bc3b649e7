"""What one training step compares: student and teacher at x_t, with the step before as the sampler sees it.

objective = Objective(teacher, student, recipe)
losses = objective(x0, teacher.given(labels), generator)
losses.total.backward()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bidm_cli.binary.surgery import select_blocks
from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.model import DiffusionModel, Memory
from bidm_cli.distill.features import FeatureTap
from bidm_cli.distill.spd import FeatureMSE, SpacePatchedDistillation
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.prediction import Clipping, estimate
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
class TeacherTargets:
    """One step's inputs and what the teacher says to them. Nothing in it depends on the student.

    Attributes:
        x, t, told: what both networks get, N rows.
        wanted: the teacher's output for it. features: what the feature loss compares.
        x_before, t_before: the sampler step before, of the rows from ``plain`` on; None without connections.
        plain: how many rows in front are trained without a step before.
        fresh: [N], those rows and the ones before which the sampler has no step.
    """

    x: Tensor
    t: Tensor
    told: Condition
    wanted: Tensor
    features: list[Tensor]
    x_before: Tensor | None = None
    t_before: Tensor | None = None
    plain: int = 0
    fresh: Tensor | None = None


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
        names: list[str] = []
        if recipe.distill.loss != "none" and recipe.distill.weight > 0:
            names = select_blocks(teacher.unet, recipe.distill.features, recipe.where("distill"))
        if names:
            self.teacher_tap = FeatureTap(teacher.unet, names)
            self.student_tap = FeatureTap(student.unet, names)
            spd = recipe.distill.loss == "spd"
            self.feature_loss = SpacePatchedDistillation(recipe.distill.patches) if spd else FeatureMSE()

    def __call__(self, x0: Tensor, given: Condition, generator: torch.Generator) -> Losses:
        """Losses for clean samples x0 [N, C, H, W] and their conditions.

        ``generator`` decides all randomness.
        """
        return self.losses(self.prepare(x0, given, generator))

    @torch.no_grad()
    def prepare(self, x0: Tensor, given: Condition, generator: torch.Generator) -> TeacherTargets:
        """The teacher's half of :meth:`__call__`; may run while the student learns the lesson before."""
        told = self._condition(given, generator)
        schedule = self.teacher.schedule
        t = torch.randint(schedule.timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = schedule.add_noise(x0, noise, t)
        before: dict[str, Any] = {}
        if self.connected:
            x, before = self._step_before(x0, x, t, noise, told, generator)
        t = t.to(x0.device)
        wanted = self.teacher.denoise(told.join(x), t, told.context, told.y)
        features = self.feature_loss.targets(self.teacher_tap.take()) if self.feature_loss else []
        if self.recipe.distill.target == "noise":
            wanted = self._noise_target(x0, x, t)
        return TeacherTargets(x, t, told, wanted, features, **before)

    def losses(self, lesson: TeacherTargets) -> Losses:
        """The student's half of :meth:`__call__`."""
        memory = self._memory(lesson)
        output = self._student(lesson.x, lesson.t, lesson.told, memory, lesson.fresh)
        compared = output[:, : lesson.wanted.shape[1]]
        noise = (compared.float() - lesson.wanted.float()).square().mean()
        feature = noise.new_zeros(())
        if self.feature_loss is not None:
            feature = self.feature_loss.compare(self.student_tap.take(), lesson.features)
        return Losses(noise + self.recipe.distill.weight * feature, noise, feature)

    def _condition(self, given: Condition, generator: torch.Generator) -> Condition:
        """``given`` with some rows' label or context dropped, where the model knows what none is."""
        droppable = given.context if given.y is None else given.y
        if droppable is None or (self.teacher.null_label is None and self.teacher.null_context is None):
            return given
        dropped = torch.rand(len(droppable), generator=generator) < NULL_LABEL_RATE
        with torch.no_grad():
            return given.mixed(self.teacher.unconditional(given), dropped)

    def _step_before(
        self,
        x0: Tensor,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        told: Condition,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(x, what a lesson holds of the sampler step before) for a network with connections."""
        assert self.recipe.tbs is not None
        schedule, last = self.teacher.schedule, self.teacher.schedule.timesteps - 1
        # Rounded up or down at random, so that the share is right for every batch size.
        plain = int(len(x0) * self.recipe.tbs.plain + torch.rand((), generator=generator).item())
        fresh = (torch.arange(len(x0)) < plain) | (t + self.stride > last)
        t_before = (t + self.stride).clamp(max=last)[plain:]
        x_before = schedule.add_noise(x0[plain:], noise[plain:], t_before)
        if self.recipe.tbs.pair == "ddim":
            stepped = self._sampler_step(x_before, t_before, t[plain:], told.map(lambda rows: rows[plain:]))
            kept = fresh[plain:].reshape(-1, 1, 1, 1).to(x.device)
            x = torch.cat([x[:plain], torch.where(kept, x[plain:], stepped)])
        elif self.recipe.tbs.pair == "independent":
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            x = schedule.add_noise(x0, noise, t)
        return x, {
            "x_before": x_before,
            "t_before": t_before.to(x.device),
            "plain": plain,
            "fresh": fresh.to(x.device),
        }

    @torch.no_grad()
    def _memory(self, lesson: TeacherTargets) -> Memory | None:
        """What the student carries into the lesson: features of the sampler step before, or zeros."""
        if lesson.x_before is None or lesson.t_before is None:
            return None
        memory: Memory = {}
        if not len(lesson.x_before):
            return memory
        told = lesson.told.map(lambda rows: rows[lesson.plain :])
        self._student(lesson.x_before, lesson.t_before, told, memory, None)
        if self.feature_loss is not None:
            self.student_tap.take()
        for name, feature in memory.items():
            memory[name] = torch.cat([feature.new_zeros(lesson.plain, *feature.shape[1:]), feature])
        return memory

    @torch.no_grad()
    def _sampler_step(self, x: Tensor, t: Tensor, to: Tensor, told: Condition) -> Tensor:
        """One deterministic DDIM step (arXiv 2010.02502, eq. 12) with the teacher's prediction."""
        output = self.teacher.denoise(told.join(x), t.to(x.device), told.context, told.y)
        if self.feature_loss is not None:
            self.teacher_tap.take()
        # Binarized pixel models are sampled with x0 clipped; the pairs they are trained on follow.
        clip = clipping(self.student)
        schedule = self.teacher.schedule
        limits = Clipping.of(self.student.convention)
        seen = estimate(self.teacher.prediction, x, output, schedule.at(t, x), clip, limits)
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

    def _noise_target(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What the network should have said knowing x0: the noise in x_t, or x0 or v made of it."""
        ab = self.teacher.schedule.at(t, x0)
        noise = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
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
