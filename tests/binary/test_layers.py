"""Binary layers against the formula of method.md, written out independently with loops and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bidm_cli.binary import functional
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import AsymmetricConv2d, with_role
from bidm_cli.recipe.spec import BinarySpec


def by_hand(layer: BinaryLayer, x: torch.Tensor) -> np.ndarray:
    """y = D K alpha + bias + |s| P(I), one output at a time, in float64."""
    g = layer.geometry
    weight = layer.weight.detach().double().numpy().reshape(g.out_channels, g.in_channels, *g.kernel)
    image = x.detach().double().numpy()
    tau = np.zeros(g.in_channels) if layer.threshold is None else layer.threshold.detach().double().numpy()
    n, channels, height, width = image.shape
    out_h, out_w = g.output_size(height, width)
    left, _, top, _ = g.padding
    y = np.zeros((n, g.out_channels, out_h, out_w))
    for index in np.ndindex(n, out_h, out_w):
        b, i, j = index
        dot, scale = np.zeros(g.out_channels), 0.0
        for u, v in np.ndindex(*g.kernel):
            row, column = i * g.stride[0] + u - top, j * g.stride[1] + v - left
            if not (0 <= row < height and 0 <= column < width):
                continue
            pixel = image[b, :, row, column]
            dot += np.where(weight[:, :, u, v] >= 0, 1, -1) @ np.where(pixel + tau >= 0, 1, -1)
            if layer.scale_filter is not None:
                scale += np.abs(pixel).mean() * layer.scale_filter[u, v].item()
        value = dot * (scale if layer.scale_filter is not None else 1.0)
        value = value * np.abs(weight).mean(axis=(1, 2, 3))
        if layer.bias is not None:
            value = value + layer.bias.detach().double().numpy()
        if layer.shortcut_scale is not None:
            rows = slice(i * g.stride[0], i * g.stride[0] + g.stride[0])
            columns = slice(j * g.stride[1], j * g.stride[1] + g.stride[1])
            cell = image[b, :, rows, columns].mean(axis=(1, 2))
            o = np.arange(g.out_channels)
            if g.out_channels >= channels:
                tiled = cell[o % channels]
            else:
                tiled = np.array([cell[k :: g.out_channels].mean() for k in o])
            value = value + abs(float(layer.shortcut_scale)) * tiled
        y[b, :, i, j] = value
    return y


@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "padding", "size"),
    [
        (8, 8, 3, 1, 1, (5, 4)),
        (7, 5, 3, 2, 1, (6, 7)),
        (5, 9, 1, 1, 0, (3, 3)),
        (12, 5, 1, 1, 0, (1, 1)),
        (3, 4, 3, 1, 1, (1, 1)),
        (4, 6, 5, 1, 2, (4, 3)),
    ],
)
def test_conv2d_is_the_formula(channels, out, kernel, stride, padding, size):
    torch.manual_seed(channels)
    layer = BinaryLayer.from_float(nn.Conv2d(channels, out, kernel, stride, padding), BinarySpec())
    with torch.no_grad():
        layer.threshold.normal_(std=0.3)
        layer.scale_filter.normal_()
        layer.shortcut_scale.fill_(-0.7)
    x = torch.randn(2, channels, *size)
    np.testing.assert_allclose(layer(x).detach().numpy(), by_hand(layer, x), rtol=1e-4, atol=1e-4)


def test_padding_on_two_sides_counts_nothing():
    torch.manual_seed(0)
    layer = BinaryLayer.from_float(AsymmetricConv2d(6, 6, 3, 2, (0, 1, 0, 1)), BinarySpec())
    x = torch.randn(2, 6, 6, 8)
    y = layer(x)
    assert y.shape == (2, 6, 3, 4)
    np.testing.assert_allclose(y.detach().numpy(), by_hand(layer, x), rtol=1e-4, atol=1e-4)


def test_conv1d_and_linear_agree_with_a_1x1_convolution():
    torch.manual_seed(1)
    conv1d, linear = nn.Conv1d(6, 9, 1), nn.Linear(6, 9)
    with torch.no_grad():
        linear.weight.copy_(conv1d.weight[:, :, 0])
        linear.bias.copy_(conv1d.bias)
    x = torch.randn(2, 6, 5)
    along = BinaryLayer.from_float(conv1d, BinarySpec())
    flat = BinaryLayer.from_float(linear, BinarySpec())
    assert torch.allclose(along(x), flat(x.transpose(1, 2)).transpose(1, 2), atol=1e-6)
    np.testing.assert_allclose(
        along(x).detach().numpy()[:, :, None], by_hand(along, x[:, :, None]), rtol=1e-4, atol=1e-4
    )


def test_float_activations_are_a_convolution_with_scaled_signs():
    torch.manual_seed(2)
    conv = nn.Conv2d(5, 4, 3, padding=1)
    layer = BinaryLayer.from_float(conv, BinarySpec(activations="float", shortcut="none"))
    assert layer.threshold is None and layer.scale_filter is None
    x = torch.randn(1, 5, 4, 4)
    alpha = conv.weight.abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = nn.functional.conv2d(x, alpha * torch.sign(conv.weight), conv.bias, padding=1)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_starts_from_the_teacher_and_keeps_role_and_bias():
    conv = with_role(nn.Conv2d(4, 4, 3, padding=1), "conv")
    layer = BinaryLayer.from_float(conv, BinarySpec(shortcut_init=0.2))
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)
    assert layer.role == "conv"
    assert torch.equal(layer.scale_filter, torch.full((3, 3), 1 / 9))
    assert layer.shortcut_scale.item() == pytest.approx(0.2)


def test_the_fixed_scale_filter_is_stored_but_not_trained():
    layer = BinaryLayer.from_float(nn.Conv2d(4, 4, 3), BinarySpec(activation_scale="fixed"))
    assert "scale_filter" in layer.state_dict()
    assert "scale_filter" not in dict(layer.named_parameters())


def test_the_learned_scale_filter_survives_saving_and_the_first_forward():
    layer = BinaryLayer.from_float(nn.Conv2d(4, 4, 3, padding=1), BinarySpec())
    with torch.no_grad():
        layer.scale_filter.normal_()
    other = BinaryLayer.from_float(nn.Conv2d(4, 4, 3, padding=1), BinarySpec())
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.scale_filter, layer.scale_filter)


def test_no_gradient_flows_through_the_weight_scale():
    torch.manual_seed(3)
    layer = BinaryLayer.from_float(nn.Conv2d(3, 2, 1, bias=False), BinarySpec(shortcut="none"))
    x = torch.randn(4, 3, 2, 2)
    layer(x).sum().backward()
    with torch.no_grad():
        activation = functional.convolve(
            torch.where(x >= 0, 1.0, -1.0), torch.eye(3)[:, :, None, None], layer.geometry
        )
        scaled = activation * functional.activation_scale(x, layer.scale_filter, layer.geometry)
        expected = scaled.sum(dim=(0, 2, 3))[None, :] * layer.weight_scale()[:, None]
    assert torch.allclose(layer.weight.grad[:, :, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_smooth_parameters_pass_gradcheck():
    """Bias, scale filter and shortcut scale enter smoothly: numerical and analytic gradients agree."""
    torch.manual_seed(4)
    layer = BinaryLayer.from_float(nn.Conv2d(3, 4, 3, padding=1).double(), BinarySpec())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def run(bias, scale_filter, shortcut_scale):
        parts = {"bias": bias, "scale_filter": scale_filter, "shortcut_scale": shortcut_scale}
        return torch.func.functional_call(layer, parts, x)

    inputs = [
        p.detach().clone().requires_grad_() for p in (layer.bias, layer.scale_filter, layer.shortcut_scale)
    ]
    assert torch.autograd.gradcheck(run, inputs)


def test_threshold_gradient_is_the_summed_activation_gradient():
    torch.manual_seed(5)
    layer = BinaryLayer.from_float(
        nn.Conv2d(3, 2, 1, bias=False), BinarySpec(activation_scale="none", shortcut="none")
    )
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    layer(x).square().sum().backward()
    assert torch.allclose(layer.threshold.grad, x.grad.sum(dim=(0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "out"), [(4, 4), (4, 10), (10, 4), (9, 4), (3, 1)])
def test_tiling_channels(channels, out):
    x = torch.randn(2, channels, 3, 3)
    y = functional.tile_channels(x, out)
    for o in range(out):
        expected = x[:, o % channels] if out >= channels else x[:, o::out].mean(dim=1)
        assert torch.allclose(y[:, o], expected, atol=1e-6)


def test_float_shortcut_convolution_starts_as_tiling():
    layer = BinaryLayer.from_float(nn.Conv2d(6, 4, 3, padding=1), BinarySpec(shortcut="conv"))
    x = torch.randn(1, 6, 3, 3)
    through = nn.functional.conv2d(x, layer.shortcut_weight)
    assert torch.allclose(through, functional.tile_channels(x, 4), atol=1e-6)
    same = BinaryLayer.from_float(nn.Conv2d(4, 4, 3, padding=1), BinarySpec(shortcut="conv"))
    assert same.shortcut_weight is None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding_mode="circular"),
    ],
)
def test_layers_that_cannot_be_binary_are_named(layer):
    with pytest.raises(BidmError, match=r"up\.3"):
        LayerGeometry.of(layer, "up.3")
