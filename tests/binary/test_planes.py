"""Activation planes against their formula, written out independently; progressive activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.planes import gradient_share, plane_sum, scaled_gradient, sign_planes
from bidm_cli.binary.sign import sign, sign_activation
from bidm_cli.binary.surgery import set_binary_share
from bidm_cli.recipe.spec import BinarySpec


def layer_of(original: nn.Module, planes: int, **options: str) -> BinaryLayer:
    layer = BinaryLayer.from_float(original, BinarySpec(planes=planes, **options))
    with torch.no_grad():
        for name, part in layer.named_parameters():
            if name != "weight":
                part.add_(0.2 * torch.randn_like(part))
    return layer


def activation_by_hand(layer: BinaryLayer, pixel: np.ndarray) -> np.ndarray:
    """b1 + g1 b2 + g2 b3 of one pixel [C], in float64."""
    left = pixel + layer.threshold.detach().double().numpy()
    total = np.where(left >= 0, 1.0, -1.0)
    last = total
    offsets = [] if layer.plane_offset is None else layer.plane_offset.detach().double().numpy()
    for index, offset in enumerate(offsets):
        left = left - offset * last
        last = np.where(left >= 0, 1.0, -1.0)
        total = total + layer.plane_scale[index].item() * last
    return total


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize(("channels", "out", "stride"), [(7, 5, 1), (4, 8, 2)])
def test_a_convolution_is_the_formula(planes: int, channels: int, out: int, stride: int) -> None:
    torch.manual_seed(planes)
    layer = layer_of(nn.Conv2d(channels, out, 3, stride, 1), planes, shortcut="none", activation_scale="none")
    x = torch.randn(2, channels, 5, 4)
    activations = np.zeros((2, channels, 7, 6))
    for n, row, column in np.ndindex(2, 5, 4):
        pixel = x[n, :, row, column].double().numpy()
        activations[n, :, row + 1, column + 1] = activation_by_hand(layer, pixel)
    signs = np.where(layer.weight.detach().numpy() >= 0, 1.0, -1.0)
    alpha = np.abs(layer.weight.detach().numpy()).mean(axis=(1, 2, 3))
    with torch.no_grad():
        y = layer(x).numpy()
    for n, row, column in np.ndindex(2, *y.shape[2:]):
        window = activations[n, :, row * stride : row * stride + 3, column * stride : column * stride + 3]
        expected = (signs * window).sum(axis=(1, 2, 3)) * alpha + layer.bias.detach().numpy()
        np.testing.assert_allclose(y[n, :, row, column], expected, rtol=1e-4, atol=1e-4)


def test_planes_take_a_decision_on_a_tie_as_plus_one_and_nan_as_minus_one() -> None:
    first, second = sign_planes(torch.tensor([1.0, -1.0, 0.0, torch.nan]), [torch.ones(())], sign)
    assert first.tolist() == [1, -1, 1, -1]
    assert second.tolist() == [1, 1, -1, -1]


def test_training_s_single_convolution_is_the_sum_of_planes() -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Conv2d(6, 6, 3, padding=1), 3)
    x = torch.randn(2, 6, 5, 5)
    trained = layer(x)
    with torch.no_grad():
        evaluated = layer(x)
    assert trained.requires_grad and not evaluated.requires_grad
    assert torch.allclose(trained, evaluated, atol=1e-5)


def test_gradients_reach_offsets_scales_and_input_as_the_formula_says() -> None:
    z = torch.tensor([[0.3, -0.6], [1.4, 2.9]], requires_grad=True)
    offset, scale = torch.tensor([0.9, 1.1], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    planes = sign_planes(z, [offset], sign_activation)
    plane_sum(planes, scale).sum().backward()

    def slope(x: torch.Tensor) -> torch.Tensor:
        return (2 - 2 * x.abs()).clamp(min=0)

    first = torch.where(z >= 0, 1.0, -1.0)
    rest = (z - offset * first).detach()
    assert torch.allclose(z.grad, slope(z.detach()) + 0.5 * slope(rest))
    assert torch.allclose(offset.grad, -(0.5 * slope(rest) * first).sum(0))
    assert torch.equal(scale.grad, planes[1].sum().reshape(1))


def input_gradient(planes: int, depth: int = 16) -> float:
    """Norm of the loss's gradient at the input of a chain of norms and binary convs."""
    torch.manual_seed(0)
    steps: list[nn.Module] = []
    for _ in range(depth):
        conv = layer_of(nn.Conv2d(16, 16, 3, padding=1), planes, shortcut="none")
        if conv.plane_scale is not None:
            conv.plane_scale.data.fill_(1.0)
            conv.plane_offset.data.fill_(1.5)
        steps += [nn.GroupNorm(4, 16), conv]
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    out = nn.Sequential(*steps, nn.GroupNorm(4, 16))(x)
    (out * torch.randn_like(out)).sum().backward()
    return float(x.grad.norm())


def test_gradients_do_not_grow_with_depth_more_than_one_plane_s() -> None:
    assert input_gradient(2) < 4 * input_gradient(1)


def test_a_scaled_gradient_leaves_the_value_as_it_is() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    share = gradient_share(torch.tensor([0.7, -0.2]))
    assert share == pytest.approx(1 / 1.9)
    y = scaled_gradient(x * 3, share)
    assert torch.equal(y, x * 3)
    y.sum().backward()
    assert torch.allclose(x.grad, 3 * share.expand(100))


@pytest.mark.parametrize("planes", [1, 2])
def test_a_share_of_none_sees_the_input_itself_and_mixes_linearly(planes: int) -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Conv2d(4, 4, 3, padding=1), planes, shortcut="none")
    x = torch.randn(1, 4, 5, 5)
    alpha = layer.weight.abs().mean(dim=(1, 2, 3), keepdim=True)
    signs = torch.where(layer.weight >= 0, 1.0, -1.0)
    set_binary_share(layer, 0.0)
    float_activations = nn.functional.conv2d(x, alpha * signs, layer.bias, padding=1)
    assert torch.allclose(layer(x), float_activations, atol=1e-5)
    set_binary_share(layer, 1.0)
    with torch.no_grad():
        shape = (-1, 1, 1)
        offsets = [] if layer.plane_offset is None else [row.reshape(shape) for row in layer.plane_offset]
        parts = sign_planes(x + layer.threshold.reshape(shape), offsets, sign)
        binary = plane_sum(parts, layer.plane_scale)
        magnitude = nn.functional.conv2d(
            x.abs().mean(1, keepdim=True), layer.scale_filter[None, None], padding=1
        )
        mixed = nn.functional.conv2d(0.3 * binary + 0.7 * x, signs, padding=1) * (0.3 * magnitude + 0.7)
        expected = mixed * alpha.reshape(-1, 1, 1) + layer.bias.reshape(-1, 1, 1)
        set_binary_share(layer, 0.3)
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_planes_belong_to_binary_activations_and_end_at_three() -> None:
    with pytest.raises(ValueError, match="binary activations"):
        BinarySpec(activations="float", planes=2)
    for planes in (0, 4, 1.5, True):
        with pytest.raises(ValueError, match="planes"):
            BinarySpec(planes=planes)  # type: ignore[arg-type]
    assert "planes" not in BinarySpec().to_json() and BinarySpec(planes=3).to_json()["planes"] == 3
