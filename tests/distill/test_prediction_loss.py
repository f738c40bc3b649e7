"""Targets and losses of students that predict something else than their teacher."""

from __future__ import annotations

import pytest
import torch

from bidm_cli.distill.objective import Objective
from bidm_cli.distill.prediction_loss import output_target
from bidm_cli.distill.trainer import binarized_copy
from bidm_cli.distill.trajectory import trajectory_error
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_teacher, prepared

BARS = torch.tensor([0.999, 0.7, 0.2, 1e-3]).reshape(-1, 1, 1, 1)
ALPHA, SIGMA = BARS.sqrt(), (1 - BARS).sqrt()


def in_terms_of(prediction: str, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return {"epsilon": eps, "x0": x0, "v": ALPHA * eps - SIGMA * x0}[prediction]


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, eps, x_t)."""
    x0, eps = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return x0, eps, ALPHA * x0 + SIGMA * eps


@pytest.mark.parametrize("student", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("teacher", ["epsilon", "x0", "v"])
def test_who_says_the_same_in_other_terms_costs_nothing(teacher: str, student: str) -> None:
    x0, eps, x = pair(0)
    target = output_target(in_terms_of(teacher, x0, eps), x, BARS, teacher, student)
    assert target.loss(in_terms_of(student, x0, eps)).item() < 1e-6


@pytest.mark.parametrize("teacher", ["epsilon", "x0", "v"])
def test_a_student_of_v_pays_its_error_in_the_noise_over_alpha(teacher: str) -> None:
    x0, eps, x = pair(1)
    output = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    target = output_target(in_terms_of(teacher, x0, eps), x, BARS, teacher, "v")
    seen = SIGMA * x + ALPHA * output
    expected = ((seen - eps).square() / ALPHA).mean()
    assert target.loss(output).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("student", ["x0", "v"])
def test_zero_terminal_snr_divides_by_nothing(student: str) -> None:
    bars = torch.tensor([0.0, 0.5]).reshape(-1, 1, 1, 1)
    x, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    output = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = output_target(eps, x, bars, "epsilon", student).loss(output)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(output.grad).all()
    assert output.grad[0].abs().max() == 0 and output.grad[1].abs().max() > 0


def test_a_learned_variance_keeps_its_meaning() -> None:
    x0, eps, x = pair(4)
    variance = torch.randn_like(x0)
    target = output_target(torch.cat([eps, variance], 1), x, BARS, "epsilon", "v")
    right = torch.cat([in_terms_of("v", x0, eps), variance], 1)
    assert target.loss(right).item() < 1e-6
    right[:, 3:] += 1
    assert target.loss(right).item() == pytest.approx(0.5, rel=1e-3)


def test_without_another_prediction_the_loss_is_the_plain_one() -> None:
    x0, eps, x = pair(5)
    assert output_target(eps, x, BARS, "epsilon", None).loss(x0).item() == pytest.approx(
        (x0 - eps).square().mean().item(), rel=1e-6
    )


class AsV(torch.nn.Module):
    """The teacher's network, saying v."""

    def __init__(self, teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, x, t, context=None, y=None):
        bars = self.teacher.schedule.at(t, x)
        return (self.teacher.unet(x, t, context, y) - (1 - bars).sqrt() * x) / bars.sqrt()


def test_objective_and_trajectory_compare_in_the_same_terms() -> None:
    teacher = make_teacher()
    student = binarized_copy(teacher)
    student.unet, student.prediction = AsV(teacher), "v"
    recipe = Recipe.parse(TINY.replace('tbs: {connect: "decoder[-8:]"}\n', ""))
    recipe = recipe.override("distill", loss="none", predict="v")
    x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(6)).clamp(-1, 1)
    objective = Objective(teacher, student, recipe)
    losses = objective.losses(prepared(objective, x0, torch.Generator().manual_seed(0)))
    assert losses.noise.item() < 1e-6
    assert trajectory_error(teacher, student, n=2, steps=4)["mean"] < 1e-6
