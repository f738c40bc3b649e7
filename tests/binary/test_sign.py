"""The binarizers: values, gradients against their closed forms, and one registered from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bidm_cli.binary import sign as sign_module
from bidm_cli.binary.sign import register_binarizer, sign, sign_activation, sign_weight, with_derivative
from bidm_cli.binary.surgery import binarize
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.spec import BinarySpec
from tests.report.models import tiny

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


RECIPE = """
name: toy
layers:
  - {role: "*", binarize: {activation_scale: none, shortcut: none, binarizer: toy}}
"""


def test_a_binarizer_from_outside_trains_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sign_module, "_BINARIZERS", dict(sign_module._BINARIZERS))

    @register_binarizer("toy")
    def toy(w: torch.Tensor) -> torch.Tensor:
        return with_derivative(w, lambda w: torch.full_like(w, 3.0))

    model, recipe = tiny(), Recipe.parse(RECIPE)
    assert recipe.layers[0].binarize == BinarySpec(activation_scale="none", shortcut="none", binarizer="toy")
    assert Recipe.from_json(recipe.to_json()).layers == recipe.layers
    binarize(model.unet, recipe, 1000)
    layer = model.unet.get_submodule("down.0.block.0.conv1")
    signs = []

    def watch(w: torch.Tensor) -> torch.Tensor:
        signs.append(toy(w))
        signs[-1].retain_grad()
        return signs[-1]

    layer.binarizer = watch
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.unet.parameters(), lr=0.1)
    model.unet(torch.randn(2, 1, 8, 8), torch.tensor([5, 500])).square().mean().backward()
    assert torch.equal(layer.weight.grad, 3 * signs[0].grad) and layer.weight.grad.abs().max() > 0
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * layer.weight.grad)
    assert not torch.equal(layer.weight, before)

    write_packed(tmp_path / "m.bidm", *pack_model(model, recipe.to_json()))
    monkeypatch.undo()  # a packed file holds signs: reading it needs no gradient
    packed = load_packed(tmp_path / "m.bidm", backend="torch")
    assert {record.spec.binarizer for record in packed.layers if record.spec is not None} == {"toy"}


def test_unknown_and_taken_names() -> None:
    with pytest.raises(BidmError, match=r"line 4: unknown binarizer 'toy'; there are clipped_ste, quadratic"):
        binarize(tiny().unet, Recipe.parse(RECIPE), 1000)
    with pytest.raises(ValueError, match="'quadratic' already"):
        register_binarizer("quadratic")(sign)


def test_the_default_binarizer_is_not_written() -> None:
    assert "binarizer" not in BinarySpec().to_json()
    assert BinarySpec(**BinarySpec(binarizer="quadratic").to_json()).binarizer == "quadratic"
