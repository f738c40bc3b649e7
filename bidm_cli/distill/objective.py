"""Distillation loss of one training step: student against teacher at x_t, after the sampler's previous step.

objective = Objective(teacher, student, recipe)
condition = teacher.make_condition(labels)
targets = objective.prepare(x0, condition, objective.draws(len(x0), condition, generator))
objective.losses(targets).total.backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.binary.surgery import select_blocks
from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.model import CarriedFeatures, DiffusionModel
from bidm_cli.distill.prediction_loss import OutputTarget, output_target
from bidm_cli.distill.spd import FeatureMSE, SpacePatchedDistillation
from bidm_cli.distill.timesteps import training_timesteps
from bidm_cli.parallel.share import Share
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.prediction import Clipping, converted, estimate
from bidm_cli.sampling.sample import clipping
from bidm_cli.transfer import to_device

NULL_LABEL_RATE = 0.1
"""Share of conditions replaced by the null label or context in training, so that guidance works (arXiv
2207.12598)."""


@dataclass
class Losses:
    """Scalars of one step: ``total = noise + weight * feature``."""

    total: Tensor
    noise: Tensor
    feature: Tensor


@dataclass(frozen=True)
class Draws:
    """Random choices of one step for its whole batch, N rows, on the CPU.

    Attributes:
        t: timesteps [N]. noise: [N, C, H, W].
        dropped: bool [N], rows that get the null condition; None where there is none.
        plain: number of rows in front that are trained without a step before.
        second: [N, C, H, W], noise of x_t where it is not that of the step before; else None.
    """

    t: Tensor
    noise: Tensor
    dropped: Tensor | None = None
    plain: int = 0
    second: Tensor | None = None

    def rows(self, share: Share) -> Draws:
        """The choices for the rows of ``share`` alone."""
        dropped, second = (None if v is None else share.of(v) for v in (self.dropped, self.second))
        return Draws(share.of(self.t), share.of(self.noise), dropped, share.rows(self.plain), second)


@dataclass
class TeacherTargets:
    """Inputs of one step and the teacher's outputs for them. Nothing in it depends on the student.

    Attributes:
        x, t, condition: inputs of both networks, N rows.
        output: the teacher's output, or the noise, as the student has to predict it.
        features: targets of the feature loss.
        x_before, t_before: the sampler step before, of the rows from ``plain`` on; None without connections.
        plain: number of rows in front that are trained without a step before.
        fresh: [N], those rows and the ones before which the sampler has no step.
    """

    x: Tensor
    t: Tensor
    condition: Condition
    output: OutputTarget
    features: list[Tensor]
    x_before: Tensor | None = None
    t_before: Tensor | None = None
    plain: int = 0
    fresh: Tensor | None = None


class FeatureTap:
    """Outputs of named submodules in the latest forward pass, captured by hooks.

    Hooks run in the order of registration: a tap set after connections were attached sees blended features.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._modules = [network.get_submodule(name) for name in names]
        self._kept: dict[nn.Module, Tensor] = {}
        for module in self._modules:
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._kept[module] = output

    def take(self) -> list[Tensor]:
        """Captured outputs in the order of the names; forgets them, so that no graph outlives its step."""
        kept, self._kept = self._kept, {}
        return [kept[module] for module in self._modules]


class Objective:
    """Loss on the output plus weighted feature loss (BiDM, eq. 12; total = noise + lambda SPD)."""

    def __init__(self, teacher: DiffusionModel, student: DiffusionModel, recipe: Recipe) -> None:
        self.teacher, self.student, self.recipe = teacher, student, recipe
        self.connected = getattr(student.unet, "connections", None) is not None
        self.stride = connection_stride(recipe, teacher.schedule.timesteps)
        self.feature_loss: FeatureMSE | None = None
        distill, names = recipe.distill, list[str]()
        if distill.loss != "none" and distill.weight > 0:
            names = select_blocks(teacher.unet, distill.features, recipe.where("distill"))
        if names:
            self.teacher_tap = FeatureTap(teacher.unet, names)
            self.student_tap = FeatureTap(student.unet, names)
            spd = distill.loss == "spd"
            self.feature_loss = SpacePatchedDistillation(distill.patches) if spd else FeatureMSE()

    def draws(self, n: int, condition: Condition, generator: torch.Generator) -> Draws:
        """Random choices for a batch of ``n``; of ``condition`` it only matters which parts there are."""
        tbs, droppable = self.recipe.tbs, self._is_droppable(condition)
        dropped = torch.rand(n, generator=generator) < NULL_LABEL_RATE if droppable else None
        power, steps = self.recipe.train.timestep_power, self.teacher.schedule.timesteps
        t = training_timesteps(n, steps, power, generator)
        shape = (n, *self.teacher.sample_shape)
        noise = torch.randn(shape, generator=generator)
        if not self.connected:
            return Draws(t, noise, dropped)
        assert tbs is not None
        # Rounded up or down at random, so that the share is right for every batch size.
        plain = int(n * tbs.plain + torch.rand((), generator=generator).item())
        second = torch.randn(shape, generator=generator) if tbs.pair == "independent" else None
        return Draws(t, noise, dropped, plain, second)

    @torch.no_grad()
    def prepare(self, x0: Tensor, condition: Condition, draws: Draws) -> TeacherTargets:
        """Teacher's half of a step on clean samples x0 [N, C, H, W] and the :meth:`draws` for them.

        It may be prefetched while the student trains on another batch.
        """
        condition = self._with_dropout(condition, draws.dropped)
        schedule, t = self.teacher.schedule, draws.t
        noise = to_device(draws.noise, x0.device, x0.dtype)
        x = schedule.add_noise(x0, noise, t)
        before: dict[str, Any] = {}
        if self.connected:
            x, before = self._step_before(x0, x, noise, draws, condition)
        # From here on a copy of t on the GPU besides: reading it back would wait for all that is queued.
        steps = to_device(t, x0.device)
        output = self._denoise(self.teacher, x, steps, condition)
        features = self.feature_loss.targets(self.teacher_tap.take()) if self.feature_loss else []
        if self.recipe.distill.target == "noise":
            output = self._noise_target(x0, x, t)
        own = None if self.recipe.distill.predict == "teacher" else self.student.prediction
        target = output_target(output, x, schedule.at(t, x), self.teacher.prediction, own)
        return TeacherTargets(x, steps, condition, target, features, **before)

    def losses(self, targets: TeacherTargets) -> Losses:
        """Student's half of a step."""
        carried = self._carried_features(targets)
        x, t, condition = targets.x, targets.t, targets.condition
        output = self._denoise(self.student, x, t, condition, carried, targets.fresh)
        noise = targets.output.loss(output)
        feature = noise.new_zeros(())
        if self.feature_loss is not None:
            feature = self.feature_loss.compare(self.student_tap.take(), targets.features)
        return Losses(noise + self.recipe.distill.weight * feature, noise, feature)

    @staticmethod
    def _denoise(
        model: DiffusionModel,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        carried: CarriedFeatures | None = None,
        fresh: Tensor | None = None,
    ) -> Tensor:
        joined = condition.join(x)
        return model.denoise(joined, t, condition.context, condition.y, carried, fresh=fresh)

    def _with_dropout(self, condition: Condition, dropped: Tensor | None) -> Condition:
        """``condition`` with the null label or context in the rows ``dropped`` [N]."""
        return (
            condition if dropped is None else condition.mixed(self.teacher.unconditional(condition), dropped)
        )

    def _is_droppable(self, condition: Condition) -> bool:
        """True if rows may get the null label or context in place of their own."""
        known = self.teacher.null_label is not None or self.teacher.null_context is not None
        return known and not (condition.context is None and condition.y is None)

    def _step_before(
        self,
        x0: Tensor,
        x: Tensor,
        noise: Tensor,
        draws: Draws,
        condition: Condition,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(x, fields of the targets on the sampler step before) for a network with connections."""
        tbs, schedule = self.recipe.tbs, self.teacher.schedule
        assert tbs is not None
        last, t, plain = schedule.timesteps - 1, draws.t, draws.plain
        fresh = (torch.arange(len(x0)) < plain) | (t + self.stride > last)
        t_before = (t + self.stride).clamp(max=last)[plain:]
        x_before = schedule.add_noise(x0[plain:], noise[plain:], t_before)
        if tbs.pair == "ddim":
            rest = condition.map(lambda rows: rows[plain:])
            stepped = self._sampler_step(x_before, t_before, t[plain:], rest)
            kept = to_device(fresh[plain:].reshape(-1, 1, 1, 1), x.device)
            x = torch.cat([x[:plain], torch.where(kept, x[plain:], stepped)])
        elif draws.second is not None:
            x = schedule.add_noise(x0, to_device(draws.second, x0.device, x0.dtype), t)
        t_before, fresh = to_device(t_before, x.device), to_device(fresh, x.device)
        return x, {"x_before": x_before, "t_before": t_before, "plain": plain, "fresh": fresh}

    @torch.no_grad()
    def _carried_features(self, targets: TeacherTargets) -> CarriedFeatures | None:
        """h_prev of the student: its features of the sampler step before, zeros for plain rows."""
        if targets.x_before is None or targets.t_before is None:
            return None
        carried: CarriedFeatures = {}
        if not len(targets.x_before):
            return carried
        condition = targets.condition.map(lambda rows: rows[targets.plain :])
        self._denoise(self.student, targets.x_before, targets.t_before, condition, carried)
        if self.feature_loss is not None:
            self.student_tap.take()
        for name, feature in carried.items():
            carried[name] = torch.cat([feature.new_zeros(targets.plain, *feature.shape[1:]), feature])
        return carried

    def _sampler_step(self, x: Tensor, t: Tensor, to: Tensor, condition: Condition) -> Tensor:
        """One deterministic DDIM step (arXiv 2010.02502, eq. 12) with the teacher's prediction."""
        output = self._denoise(self.teacher, x, to_device(t, x.device), condition)
        if self.feature_loss is not None:
            self.teacher_tap.take()
        # Binarized pixel models are sampled with x0 clipped; the pairs they are trained on follow.
        clip, limits = clipping(self.student), Clipping.of(self.student.convention)
        schedule = self.teacher.schedule
        seen = estimate(self.teacher.prediction, x, output, schedule.at(t, x), clip, limits)
        ab = schedule.at(to, x)
        return ab.sqrt() * seen.x0 + (1 - ab).sqrt() * seen.eps

    def _noise_target(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Output of a teacher that knew x0."""
        return converted(x0, x, self.teacher.schedule.at(t, x0), "x0", self.teacher.prediction)


def connection_stride(recipe: Recipe, timesteps: int) -> int:
    """Timesteps between h_prev and h_t in training: the sampler's own, or the recipe's number."""
    if recipe.tbs is None or recipe.tbs.stride == "sampler":
        return max(1, timesteps // max(1, recipe.sampler.steps))
    return int(recipe.tbs.stride)
