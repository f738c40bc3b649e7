"""Float 3x3 convolutions by Winograd's algorithm, against convolutions in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Fused, Prologue
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.cpu.ops import winograd
from tests.helpers import close, norm_of, random

ROUNDING = 2e-5
"""Of the largest result. Winograd's transforms round some ten times as coarsely as direct sums."""


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "FEWEST_PIXELS", 0)


def conv_of(channels: int, out_channels: int, bias: bool = True, kernel: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=bias).requires_grad_(False)
    conv.weight.copy_(random(tuple(conv.weight.shape), 1))
    if conv.bias is not None:
        conv.bias.copy_(random((out_channels,), 2))
    return conv


def exact(conv: nn.Conv2d, x: Tensor, repeat: int = 1) -> Tensor:
    x = x.double()
    if repeat > 1:
        x = F.interpolate(x, scale_factor=float(repeat), mode="nearest")
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x, conv.weight.double(), bias, padding=conv.padding)


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("repeat", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("images", "height", "width", "channels", "out_channels"),
    [(1, 8, 8, 32, 32), (2, 7, 9, 64, 32), (3, 1, 1, 32, 64), (1, 2, 30, 96, 32), (1, 13, 40, 32, 160)],
)
def test_results_are_a_convolution_s(images, height, width, channels, out_channels, residual, repeat):
    conv, x = conv_of(channels, out_channels), random((images, channels, height, width), 3)
    expected = exact(conv, x, repeat)
    added = random(tuple(expected.shape), 4) if residual else None
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    inside = x.permute(0, 2, 3, 1).contiguous()
    last = None if added is None else added.permute(0, 2, 3, 1).contiguous()
    found = winograd.winograd(inside, weight, conv.bias, repeat, last).permute(0, 3, 1, 2)
    expected = expected if added is None else expected + added
    close(found, expected.float(), ROUNDING)


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [None, False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_convolutions_with_what_surrounds_them(kernel, bias, silu, residual, offset):
    conv, x = conv_of(64, 32, bias, kernel), random((2, 64, 9, 6), 3)
    prologue = None if silu is None else Prologue(norm_of(32, 64), silu)
    added = random((2, 32), 6) if offset else None
    fused = Fused(prologue, 1, added, random((2, 32, 9, 6), 5) if residual else None)
    assert NumbaBackend().convolves(conv) and not TorchBackend().convolves(conv)
    close(NumbaBackend().convolve(conv, x, fused), TorchBackend().convolve(conv, x, fused), ROUNDING)
    whole = Fused(None, 2, None, None)
    close(NumbaBackend().convolve(conv, x, whole), TorchBackend().convolve(conv, x, whole), ROUNDING)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Conv2d(64, 3, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.Conv2d(64, 64, 1, stride=2),
    ],
)
def test_other_convolutions_are_left_to_torch(conv):
    assert not NumbaBackend().convolves(conv)


def test_a_larger_layer_after_a_smaller_one_and_back():
    """The workspaces grow, and have numbers of other layers in them."""
    for channels in (32, 96, 32, 64):
        conv, x = conv_of(channels, channels), random((1, channels, 12, 12), channels)
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        found = winograd.winograd(x.permute(0, 2, 3, 1).contiguous(), weight, conv.bias)
        close(found.permute(0, 3, 1, 2), exact(conv, x).float(), ROUNDING)
