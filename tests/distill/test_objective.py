"""What a training step compares: targets, pairs for the connections, and what must not leak."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.objective import Objective, connection_stride
from bidm_cli.distill.trainer import binarized_copy
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_teacher, prepared


def objective(change: str = "", **sections) -> Objective:
    recipe = Recipe.parse(TINY)
    for section, values in sections.items():
        recipe = recipe.override(section, **values)
    if change == "no tbs":
        recipe = dataclasses.replace(recipe, tbs=None)
    teacher = make_teacher()
    student = binarized_copy(teacher)
    binarize(student.unet, recipe, 1000)
    return Objective(teacher, student, recipe)


def run(obj: Objective, seed: int = 0):
    x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9)).clamp(-1, 1)
    return obj.losses(prepared(obj, x0, torch.Generator().manual_seed(seed)))


def test_a_student_that_is_the_teacher_costs_nothing():
    obj = objective("no tbs")
    twin = make_teacher()
    same = Objective(obj.teacher, twin, dataclasses.replace(obj.recipe, tbs=None))
    losses = run(same)
    assert losses.noise.item() == pytest.approx(0, abs=1e-10)
    assert losses.feature.item() == pytest.approx(0, abs=1e-5)


def test_total_is_noise_plus_weighted_feature_loss():
    losses = run(objective(distill={"weight": 0.25}))
    assert losses.feature.item() > 0
    assert losses.total.item() == pytest.approx(losses.noise.item() + 0.25 * losses.feature.item(), rel=1e-6)
    plain = run(objective(distill={"loss": "none"}))
    assert plain.feature.item() == 0 and plain.total.item() == plain.noise.item()


def test_the_same_generator_gives_the_same_losses_and_another_gives_others():
    obj = objective()
    first, again, other = run(obj).total, run(obj).total, run(obj, seed=1).total
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_ddim_pair_is_one_sampler_step_of_the_teacher():
    """x_t must follow from x_t' by the teacher alone: no trace of the drawn noise is left to leak."""
    obj = objective(tbs={"plain": 0.25})
    x0 = torch.zeros(4, 1, 8, 8)
    targets = prepared(obj, x0, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    before = t + obj.stride
    schedule, teacher = obj.teacher.schedule, obj.teacher
    usable = (before < 1000) & torch.tensor([False, True, True, True])
    x_before = schedule.add_noise(x0, noise, before.clamp(max=999))
    with torch.no_grad():
        eps = teacher.denoise(x_before, before.clamp(max=999))
    ab, ab_t = schedule.at(before.clamp(max=999), x0), schedule.at(t, x0)
    clean = ((x_before - (1 - ab).sqrt() * eps) / ab.sqrt()).clamp(-1, 1)
    direction = (x_before - ab.sqrt() * clean) / (1 - ab).sqrt()
    expected = ab_t.sqrt() * clean + (1 - ab_t).sqrt() * direction
    expected = torch.where(usable.reshape(-1, 1, 1, 1), expected, schedule.add_noise(x0, noise, t))
    assert usable.any()
    assert torch.allclose(targets.x, expected, atol=1e-4)
    assert torch.equal(targets.fresh, ~usable)
    assert targets.plain == 1 and torch.equal(targets.x_before, x_before[1:])


@pytest.mark.parametrize("pair", ["same_noise", "independent"])
def test_other_pairs_noise_x0_themselves(pair):
    obj = objective(tbs={"pair": pair})
    targets = prepared(obj, torch.zeros(4, 1, 8, 8), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn((4, 1, 8, 8), generator=generator)
    torch.rand((), generator=generator)
    if pair == "independent":
        noise = torch.randn((4, 1, 8, 8), generator=generator)
    assert torch.allclose(targets.x, obj.teacher.schedule.add_noise(torch.zeros(4, 1, 8, 8), noise, t))


def test_the_share_of_plain_rows_is_right_on_average():
    obj = objective(tbs={"plain": 0.25})
    x0 = torch.zeros(2, 1, 8, 8)
    counts = [prepared(obj, x0, torch.Generator().manual_seed(i)).plain for i in range(40)]
    assert set(counts) == {0, 1} and 10 <= sum(counts) <= 30


def test_carried_features_have_no_graph_and_zeros_where_there_is_no_step_before():
    obj = objective(tbs={"plain": 0.5})
    targets = prepared(obj, torch.zeros(4, 1, 8, 8), torch.Generator().manual_seed(0))
    carried = obj._carried_features(targets)
    assert targets.plain == 2 and carried
    for value in carried.values():
        assert not value.requires_grad and len(value) == 4
        assert not value[:2].any() and value[2:].any()


def test_rows_without_a_step_before_are_as_without_connections():
    """Plain rows of a batch give the same output as a network that carries nothing."""
    obj = objective(tbs={"plain": 0.5, "initial": 0.4})
    targets = prepared(obj, torch.zeros(4, 1, 8, 8), torch.Generator().manual_seed(0))
    carried = obj._carried_features(targets)
    carried = obj._denoise(obj.student, targets.x, targets.t, Condition(), carried, targets.fresh)
    plain = obj._denoise(obj.student, targets.x, targets.t, Condition())
    assert torch.equal(carried[targets.fresh], plain[targets.fresh])
    assert not torch.allclose(carried[~targets.fresh], plain[~targets.fresh])


def test_the_student_is_called_as_in_sampling(monkeypatch):
    """Both passes of the student go through ``denoise``, the second with the rows that carry nothing."""
    obj, calls = objective(tbs={"plain": 0.5}), []
    targets = prepared(obj, torch.zeros(4, 1, 8, 8), torch.Generator().manual_seed(0))

    def denoise(*arguments, **named):
        calls.append(named)
        return DiffusionModel.denoise(obj.student, *arguments, **named)

    monkeypatch.setattr(obj.student, "denoise", denoise)
    obj.losses(targets)
    assert [call["fresh"] is targets.fresh for call in calls] == [False, True]


def test_stride_is_the_samplers_unless_given():
    recipe = Recipe.parse(TINY)
    assert connection_stride(recipe, 1000) == 200
    assert connection_stride(recipe.override("tbs", stride=1), 1000) == 1


def test_noise_target_is_what_was_added():
    obj = objective("no tbs", distill={"target": "noise", "loss": "none"})
    x0, noise, t = torch.ones(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([900, 300])
    x = obj.teacher.schedule.add_noise(x0, noise, t)
    assert torch.allclose(obj._noise_target(x0, x, t), noise, atol=1e-3)


def test_v_and_x0_targets():
    obj = objective("no tbs", distill={"target": "noise", "loss": "none"})
    x0, noise, t = torch.full((2, 1, 8, 8), 0.5), torch.randn(2, 1, 8, 8), torch.tensor([900, 300])
    x = obj.teacher.schedule.add_noise(x0, noise, t)
    obj.teacher.prediction = "x0"
    assert torch.equal(obj._noise_target(x0, x, t), x0)
    obj.teacher.prediction = "v"
    ab = obj.teacher.schedule.at(t, x0)
    v = ab.sqrt() * noise - (1 - ab).sqrt() * x0
    assert torch.allclose(obj._noise_target(x0, x, t), v, atol=1e-3)
