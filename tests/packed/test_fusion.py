"""Virtual inputs of packed layers (two tensors side by side, pixels repeated), and the seam's own rules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Fused, Prologue, fused_conv, joined, read_in_place, shortcut, upsampled
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import close, layer_of, norm_of, on, random

SPLITS = [(64, 32), (32, 64), (224, 32), (20, 13), (33, 31), (1, 45), (45, 1), (16, 48), (100, 28)]


def test_what_virtual_inputs_stand_for() -> None:
    parts = random((2, 3, 4, 5), 1), random((2, 2, 4, 5), 2)
    whole = torch.cat(parts, dim=1)
    assert torch.equal(joined(parts), whole) and joined(whole) is whole
    doubled = F.interpolate(whole, scale_factor=2.0, mode="nearest")
    assert torch.equal(upsampled(whole, 2), doubled) and upsampled(whole, 1) is whole


class Plain(nn.Module):
    """A layer that can fuse nothing, and notes what it is called on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.conv = nn.Conv2d(channels, channels, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.conv(x)


def test_layers_that_fuse_nothing_are_called_on_one_tensor() -> None:
    parts, layer, norm = (random((2, 5, 3, 4), 1), random((2, 3, 3, 4), 2)), Plain(8), norm_of(2, 8)
    scale, shift, offset = random((2, 8), 3), random((2, 8), 4), random((2, 8), 5)
    residual = random((2, 8, 6, 8), 6)
    prologue = Prologue(norm, True, scale, shift, nn.Dropout(0.5).eval())
    found = fused_conv(layer, parts, prologue=prologue, upsample=2, offset=offset, residual=residual)
    normed = norm(torch.cat(parts, dim=1)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    (x,) = layer.seen
    assert torch.equal(x, F.interpolate(F.silu(normed), scale_factor=2.0, mode="nearest"))
    assert torch.equal(found, residual + (layer.conv(x) + offset[:, :, None, None]))


def test_float_layers_share_one_concatenation(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, (conv, skip) = (random((1, 5, 3, 4), 1), random((1, 3, 3, 4), 2)), (Plain(8), Plain(8))
    x = read_in_place(conv, parts)
    assert isinstance(x, Tensor)
    fused_conv(conv, x, prologue=Prologue(norm_of(2, 8)))
    shortcut(skip, x)
    assert skip.seen[0] is x


def test_only_a_backend_that_reads_parts_gets_them() -> None:
    layer, parts = layer_of(nn.Conv2d(8, 8, 3), BinarySpec()), (random((1, 4, 3, 3), 0),) * 2
    assert read_in_place(layer, parts) is parts
    on(layer, TorchBackend())
    assert isinstance(read_in_place(layer, parts), Tensor)


def test_hooks_see_a_layer_that_fuses() -> None:
    """Sign flips, precision and timing listen to the layers."""
    layer, seen = layer_of(nn.Conv2d(32, 32, 3, padding=1), BinarySpec()), []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    x, prologue = random((1, 32, 3, 3), 0), Prologue(norm_of(4, 32))
    fused_conv(layer, x, prologue=prologue, residual=x)
    (inputs,) = seen
    assert inputs[0] is x and inputs[1].prologue is prologue and inputs[1].residual is x


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("filters", ["same", "fewer", "odd"])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_two_parts_are_their_concatenation_bit_for_bit(
    split: tuple[int, int], normed: bool, filters: str, planes: int
) -> None:
    """Groups of the norm, words and the shortcut's vectors straddle the boundary in most of these."""
    channels = sum(split)
    o = {"same": channels, "fewer": 32, "odd": 21}[filters]
    layer = layer_of(nn.Conv2d(channels, o, 3, padding=1), BinarySpec(planes=planes))
    groups = next(g for g in (3, 4, 7, 23, 2) if channels % g == 0)
    prologue = Prologue(norm_of(groups, channels), silu=True) if normed else None
    parts = tuple(3 * random((2, c, 5, 7), i) + i for i, c in enumerate(split))
    whole = torch.cat(parts, dim=1)
    numba, reference = NumbaBackend(), TorchBackend()
    assert torch.equal(
        numba.signs(layer.tensors, parts, Fused(prologue)),
        reference.signs(layer.tensors, whole, Fused(prologue)),
    )
    found = numba.run(layer.tensors, parts, Fused(prologue))
    assert torch.equal(found, numba.run(layer.tensors, whole, Fused(prologue)))
    close(found, reference.run(layer.tensors, whole, Fused(prologue)))


@pytest.mark.parametrize(
    "spec", [BinarySpec(shortcut="none"), BinarySpec(shortcut="conv"), BinarySpec("float", shortcut="none")]
)
def test_two_parts_with_other_shortcuts(spec: BinarySpec) -> None:
    layer = layer_of(nn.Conv2d(40, 24, 1), spec)
    parts = (random((2, 17, 6, 3), 1), random((2, 23, 6, 3), 2))
    residual = random((2, 24, 6, 3), 3)
    expected = TorchBackend().run(layer.tensors, torch.cat(parts, dim=1), Fused(residual=residual))
    close(NumbaBackend().run(layer.tensors, parts, Fused(residual=residual)), expected)


UPSAMPLED = {
    "same width": (nn.Conv2d(64, 64, 3, padding=1), BinarySpec()),
    "odd": (nn.Conv2d(33, 33, 3, padding=1), BinarySpec()),
    "narrower": (nn.Conv2d(64, 32, 3, padding=1), BinarySpec()),
    "narrower, odd": (nn.Conv2d(45, 20, 3, padding=1), BinarySpec()),
    "wider": (nn.Conv2d(32, 96, 3, padding=1), BinarySpec()),
    "no padding": (nn.Conv2d(32, 32, 3), BinarySpec()),
    "5x5": (nn.Conv2d(40, 40, 5, padding=2), BinarySpec()),
    "stride": (nn.Conv2d(32, 32, 3, stride=2, padding=1), BinarySpec()),
    "growing": (nn.Conv2d(32, 32, 1, padding=2), BinarySpec()),
    "shortcut conv": (nn.Conv2d(32, 48, 3, padding=1), BinarySpec(shortcut="conv")),
    "weights only": (nn.Conv2d(32, 32, 3, padding=1), BinarySpec("float", shortcut="none")),
}


@pytest.mark.parametrize("name", UPSAMPLED)
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_repeated_pixels_are_nearest_neighbour_upsampling(
    name: str, size: tuple[int, int], parts: int, planes: int
) -> None:
    if name == "no padding" and size == (1, 1):
        size = (2, 2)
    original, spec = UPSAMPLED[name]
    if spec.activations == "binary":
        spec = dataclasses.replace(spec, planes=planes)
    layer = layer_of(original, spec)
    x = random((2, layer.geometry.in_channels, *size), 1)
    split = x.split(x.shape[1] if parts == 1 else x.shape[1] - 7, dim=1)
    whole = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if layer.spec.activations == "binary":
        signs = NumbaBackend().signs(layer.tensors, split, Fused(upsample=2))
        assert torch.equal(signs, TorchBackend().signs(layer.tensors, whole))
    found = NumbaBackend().run(layer.tensors, split, Fused(upsample=2))
    close(found, NumbaBackend().run(layer.tensors, whole), 1e-7)
    close(found, TorchBackend().run(layer.tensors, whole))
