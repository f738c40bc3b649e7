"""Space Patched Distillation against a loop over patches written from its definition."""

from __future__ import annotations

import pytest
import torch

from bidm_cli.distill.spd import SpacePatchedDistillation, patches_for


def by_hand(student: torch.Tensor, teacher: torch.Tensor, p: int) -> float:
    n, channels, height, width = student.shape
    h, w = height // p, width // p
    total, count = 0.0, 0
    for b in range(n):
        for i in range(p):
            for j in range(p):
                maps = []
                for feature in (student, teacher):
                    patch = feature[b, :, i * h : (i + 1) * h, j * w : (j + 1) * w]
                    g = torch.stack([patch[c] @ patch[c].T for c in range(channels)])
                    maps.append(g / g.norm())
                total, count = total + (maps[0] - maps[1]).norm().item(), count + 1
    return total / count


@pytest.mark.parametrize(("size", "p"), [((8, 8), 4), ((8, 12), 4), ((4, 4), 2), ((6, 6), 3), ((2, 2), 1)])
def test_is_its_definition_with_patches_scaled_to_the_map(size, p):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, *size)
    assert patches_for(*size, 4) == p
    loss = SpacePatchedDistillation(4)([student], [teacher])
    assert loss.item() == pytest.approx(by_hand(student, teacher, p), rel=1e-5)


def test_does_not_depend_on_the_batch_size():
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 5, 8, 8)
    teacher[2] *= 100
    spd = SpacePatchedDistillation()
    whole = spd([student], [teacher])
    single = torch.stack([spd([student[i : i + 1]], [teacher[i : i + 1]]) for i in range(4)]).mean()
    assert whole.item() == pytest.approx(single.item(), rel=1e-5)


def test_scale_of_the_features_does_not_matter_and_equal_features_cost_nothing():
    torch.manual_seed(2)
    feature = torch.randn(2, 5, 8, 8)
    spd = SpacePatchedDistillation()
    assert spd([feature], [3 * feature]).item() == pytest.approx(0, abs=1e-6)
    assert spd([feature], [torch.randn(2, 5, 8, 8)]).item() > 0.1


def test_gradient_is_right_and_finite_at_zero():
    torch.manual_seed(3)
    student = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    spd = SpacePatchedDistillation(2)
    spd([student], [teacher]).backward()
    step = torch.zeros_like(student)
    step[0, 1, 2, 3] = 1e-3
    numeric = (spd([student + step], [teacher]) - spd([student - step], [teacher])) / 2e-3
    assert student.grad[0, 1, 2, 3].item() == pytest.approx(numeric.item(), rel=1e-2, abs=1e-5)
    same = teacher.clone().requires_grad_()
    spd([same], [teacher]).backward()
    assert torch.isfinite(same.grad).all()


def test_tokens_become_a_map():
    torch.manual_seed(4)
    student, teacher = torch.randn(2, 2, 16, 6)
    spd = SpacePatchedDistillation(2)
    as_maps = [f.transpose(1, 2).reshape(2, 6, 4, 4) for f in (student, teacher)]
    assert torch.equal(spd([student], [teacher]), spd([as_maps[0]], [as_maps[1]]))
