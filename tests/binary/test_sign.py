"""The two binarizers: values, and gradients against their closed forms."""

from __future__ import annotations

import pytest
import torch

from bidm_cli.binary.sign import sign, sign_activation, sign_weight

POINTS = torch.tensor([-2.0, -1.0, -0.75, -0.25, -0.0, 0.0, 0.25, 0.75, 1.0, 2.0])


@pytest.mark.parametrize("binarizer", [sign, sign_weight, sign_activation])
def test_sign_of_zero_is_plus_one(binarizer):
    expected = torch.tensor([-1.0, -1, -1, -1, 1, 1, 1, 1, 1, 1])
    assert torch.equal(binarizer(POINTS), expected)
    assert torch.equal(binarizer(torch.tensor([float("nan")])), torch.tensor([-1.0]))


def test_sign_keeps_the_dtype():
    assert sign(POINTS.half()).dtype == torch.float16
    assert sign(POINTS.double()).dtype == torch.float64


def test_weight_gradient_is_the_identity_inside_one():
    x = POINTS.clone().requires_grad_()
    upstream = torch.arange(1.0, 11.0)
    sign_weight(x).backward(upstream)
    assert torch.equal(x.grad, upstream * (POINTS.abs() <= 1))


def test_activation_gradient_is_the_piecewise_quadratic_s():
    x = POINTS.clone().requires_grad_()
    upstream = torch.arange(1.0, 11.0)
    sign_activation(x).backward(upstream)
    expected = []
    for value in POINTS.tolist():
        if -1 <= value < 0:
            expected.append(2 + 2 * value)
        elif 0 <= value < 1:
            expected.append(2 - 2 * value)
        else:
            expected.append(0.0)
    assert torch.allclose(x.grad, upstream * torch.tensor(expected))
