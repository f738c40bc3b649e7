"""Inputs that are described rather than made: two tensors side by side, pixels repeated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bidm_cli.packed.backend import Prologue
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.lazy import Lazy, made, repeated
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import close, layer_of, norm_of, random

SPLITS = [(64, 32), (32, 64), (224, 32), (20, 13), (33, 31), (1, 45), (45, 1), (16, 48), (100, 28)]


def test_what_a_lazy_input_stands_for() -> None:
    a, b = random((2, 3, 4, 5), 1), random((2, 2, 4, 5), 2)
    lazy = Lazy((a, b), repeat=2)
    expected = F.interpolate(torch.cat([a, b], dim=1), scale_factor=2.0, mode="nearest")
    assert torch.equal(made(lazy), expected) and lazy.shape == expected.shape and lazy.dim() == 4
    assert made(a) is a


def test_only_numba_reads_lazily() -> None:
    x = random((1, 4, 3, 3), 0)
    assert isinstance(repeated(x, NumbaBackend()), Lazy)
    assert torch.equal(repeated(x, TorchBackend()), F.interpolate(x, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("filters", ["same", "fewer", "odd"])
def test_two_parts_are_their_concatenation_bit_for_bit(
    split: tuple[int, int], normed: bool, filters: str
) -> None:
    """Groups of the norm, words and the shortcut's vectors straddle the boundary in most of these."""
    channels = sum(split)
    o = {"same": channels, "fewer": 32, "odd": 21}[filters]
    layer = layer_of(nn.Conv2d(channels, o, 3, padding=1), BinarySpec())
    groups = next(g for g in (3, 4, 7, 23, 2) if channels % g == 0)
    prologue = Prologue(norm_of(groups, channels), silu=True) if normed else None
    parts = tuple(3 * random((2, c, 5, 7), i) + i for i, c in enumerate(split))
    lazy, whole = Lazy(parts), torch.cat(parts, dim=1)
    numba, reference = NumbaBackend(), TorchBackend()
    assert torch.equal(
        numba.signs(layer.tensors, lazy, prologue), reference.signs(layer.tensors, whole, prologue)
    )
    found = numba.run(layer.tensors, lazy, prologue)
    assert torch.equal(found, numba.run(layer.tensors, whole, prologue))
    close(found, reference.run(layer.tensors, whole, prologue))


@pytest.mark.parametrize(
    "spec", [BinarySpec(shortcut="none"), BinarySpec(shortcut="conv"), BinarySpec("float", shortcut="none")]
)
def test_two_parts_with_other_shortcuts(spec: BinarySpec) -> None:
    layer = layer_of(nn.Conv2d(40, 24, 1), spec)
    parts = (random((2, 17, 6, 3), 1), random((2, 23, 6, 3), 2))
    residual = random((2, 24, 6, 3), 3)
    expected = TorchBackend().run(layer.tensors, torch.cat(parts, dim=1), None, None, residual)
    close(NumbaBackend().run(layer.tensors, Lazy(parts), None, None, residual), expected)


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
def test_repeated_pixels_are_nearest_neighbour_upsampling(
    name: str, size: tuple[int, int], parts: int
) -> None:
    if name == "no padding" and size == (1, 1):
        size = (2, 2)
    layer = layer_of(*UPSAMPLED[name])
    x = random((2, layer.geometry.in_channels, *size), 1)
    lazy = Lazy(x.split(x.shape[1] if parts == 1 else x.shape[1] - 7, dim=1), repeat=2)
    whole = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if layer.spec.activations == "binary":
        signs = NumbaBackend().signs(layer.tensors, lazy)
        assert torch.equal(signs, TorchBackend().signs(layer.tensors, whole))
    found = NumbaBackend().run(layer.tensors, lazy)
    close(found, NumbaBackend().run(layer.tensors, whole), 1e-7)
    close(found, TorchBackend().run(layer.tensors, whole))
