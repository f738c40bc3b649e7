from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.format.bits import pack_bits, weight_words, words_per_tap
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import layer_of, random
from tests.small_ops import REFERENCE, NumbaOps

# channels, filters, kernel, stride, padding (left, right, top, bottom), images, height, width
CONVOLUTIONS = [
    (32, 32, (3, 3), (1, 1), (1, 1, 1, 1), 2, 8, 8),
    (45, 37, (3, 3), (1, 1), (1, 1, 1, 1), 3, 7, 5),
    (1, 1, (3, 3), (1, 1), (1, 1, 1, 1), 1, 1, 1),
    (7, 70, (3, 3), (2, 2), (1, 1, 1, 1), 2, 9, 8),
    (64, 64, (3, 3), (2, 2), (0, 1, 0, 1), 2, 8, 8),
    (64, 33, (3, 3), (2, 2), (0, 1, 0, 1), 1, 7, 2),
    (130, 96, (1, 1), (1, 1), (0, 0, 0, 0), 2, 6, 3),
    (33, 20, (1, 1), (2, 2), (0, 0, 0, 0), 1, 5, 5),
    (20, 50, (5, 3), (1, 2), (2, 0, 1, 3), 2, 6, 9),
    (40, 16, (2, 4), (3, 1), (5, 4, 3, 2), 1, 3, 2),
    (256, 300, (3, 3), (1, 1), (0, 0, 0, 0), 1, 5, 6),
    (96, 64, (7, 7), (1, 1), (3, 3, 3, 3), 1, 4, 4),
]


def geometry_of(case: tuple) -> LayerGeometry:
    channels, filters, kernel, stride, padding, *_ = case
    return LayerGeometry("conv2d", channels, filters, kernel, stride, padding)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_integers_of_convolutions_are_bit_equal(case: tuple) -> None:
    geometry, (n, height, width) = geometry_of(case), case[5:]
    x = random((n, height, width, geometry.in_channels), 1)
    threshold = random((geometry.in_channels,), 2)
    weight = random((geometry.out_channels, geometry.in_channels, *geometry.kernel), 3)
    numba, torch_ = NumbaOps(), REFERENCE
    words, sums = numba.binarize_pack(x, threshold)
    expected_words, expected_sums = torch_.binarize_pack(x, threshold)
    assert torch.equal(words, expected_words)
    torch.testing.assert_close(sums, expected_sums)
    weights = weight_words(pack_bits(weight), geometry)
    integers = numba.binary_conv2d(words, weights, geometry)
    assert integers.dtype == torch.int32
    assert torch.equal(integers, torch_.binary_conv2d(words, weights, geometry))


def planes_of(planes: int, geometry: LayerGeometry, size: tuple[int, int, int]) -> tuple:
    """Arguments of ``planes_conv2d``; some offsets are negative, and some activations zero or not finite."""
    c = geometry.in_channels
    x, offsets = random((*size, c), 1), 1 + random((planes - 1, c), 4)
    x.flatten()[::17] = 0.0
    x.flatten()[5::31] = torch.tensor([float("nan"), torch.inf, -torch.inf])[len(x.flatten()[5::31]) % 3]
    scales, weight = random((planes - 1,), 5), random((geometry.out_channels, c, *geometry.kernel), 3)
    return x, random((c,), 2), offsets, scales, weight_words(pack_bits(weight), geometry), geometry


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_planes_of_convolutions_are_bit_equal(case: tuple, planes: int) -> None:
    arguments = planes_of(planes, geometry_of(case), case[5:])
    signs, dots = NumbaOps().planes_conv2d(*arguments)
    expected_signs, expected_dots = REFERENCE.planes_conv2d(*arguments)
    assert torch.equal(signs, expected_signs)
    assert torch.equal(dots, expected_dots)


@pytest.mark.parametrize("seed", range(20))
def test_integers_of_random_shapes_are_bit_equal(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    kernel = (pick(1, 4), pick(1, 4))
    padding = (pick(0, 2), pick(0, 2), pick(0, 2), pick(0, 2))
    geometry = LayerGeometry("conv2d", pick(1, 150), pick(1, 80), kernel, (pick(1, 3), pick(1, 3)), padding)
    height, width = pick(kernel[0], 12), pick(kernel[1], 12)
    words = torch.randint(
        -(2**31), 2**31, (pick(1, 3), height, width, words_per_tap(geometry.in_channels)), generator=generator
    ).int()
    weight = torch.randn((geometry.out_channels, geometry.in_channels, *kernel), generator=generator)
    weights = weight_words(pack_bits(weight), geometry)
    surplus = geometry.in_channels % 32
    if surplus:
        words[..., -1] &= (1 << surplus) - 1
    assert torch.equal(
        NumbaOps().binary_conv2d(words, weights, geometry),
        REFERENCE.binary_conv2d(words, weights, geometry),
    )


@pytest.mark.parametrize(("tokens", "channels", "filters"), [(1, 1, 1), (7, 100, 65), (200, 512, 96)])
def test_integers_of_linear_layers_are_bit_equal(tokens: int, channels: int, filters: int) -> None:
    words = REFERENCE.binarize_pack(random((tokens, channels), 1), None)[0]
    weights = REFERENCE.binarize_pack(random((filters, channels), 2), None)[0]
    expected = REFERENCE.binary_linear(words, weights, channels)
    assert torch.equal(NumbaOps().binary_linear(words, weights, channels), expected)


def test_zero_is_plus_one_and_nan_is_minus_one() -> None:
    x = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45]])
    assert NumbaOps().binarize_pack(x, None)[0].tolist() == [[0b0101011]]
    assert torch.equal(NumbaOps().binarize_pack(x, None)[0], REFERENCE.binarize_pack(x, None)[0])


FULL = BinarySpec()
LAYERS = [
    ("same width", nn.Conv2d(32, 32, 3, padding=1), FULL, (2, 32, 8, 8)),
    ("odd width", nn.Conv2d(37, 37, 3, padding=1), FULL, (2, 37, 5, 7)),
    ("wider, whole vectors", nn.Conv2d(32, 96, 3, padding=1), FULL, (2, 32, 4, 4)),
    ("wider, odd", nn.Conv2d(20, 50, 3, padding=1), FULL, (2, 20, 4, 4)),
    ("narrower", nn.Conv2d(96, 32, 3, padding=1), FULL, (2, 96, 4, 4)),
    ("narrower, odd", nn.Conv2d(50, 20, 1), FULL, (2, 50, 4, 4)),
    ("narrower by half", nn.Conv2d(96, 64, 3, padding=1), FULL, (1, 96, 6, 6)),
    ("stride 2", nn.Conv2d(32, 32, 3, stride=2, padding=1), FULL, (2, 32, 7, 8)),
    ("stride 2, narrower", nn.Conv2d(64, 32, 3, stride=2, padding=1), FULL, (2, 64, 9, 8)),
    ("stride 2, odd width", nn.Conv2d(37, 37, 3, stride=2, padding=1), FULL, (2, 37, 7, 8)),
    ("stride 3 and 1", nn.Conv2d(32, 64, (3, 1), stride=(3, 1)), FULL, (2, 32, 10, 4)),
    ("stride 2, right and bottom", nn.Conv2d(32, 32, 2, stride=2), FULL, (1, 32, 5, 6)),
    ("stride and growing", nn.Conv2d(32, 32, 1, stride=2, padding=6), FULL, (1, 32, 3, 3)),
    ("no padding", nn.Conv2d(32, 32, 3), FULL, (2, 32, 7, 8)),
    ("growing", nn.Conv2d(32, 32, 1, padding=2), FULL, (2, 32, 3, 3)),
    ("one pixel", nn.Conv2d(64, 64, 3, padding=1), FULL, (3, 64, 1, 1)),
    ("shortcut conv", nn.Conv2d(32, 48, 3, padding=1), BinarySpec(shortcut="conv"), (2, 32, 5, 5)),
    (
        "xnor",
        nn.Conv2d(32, 48, 3, padding=1, bias=False),
        BinarySpec("binary", "layer", "fixed", "none", "none"),
        (1, 32, 5, 5),
    ),
    ("bare", nn.Conv2d(32, 48, 3), BinarySpec("binary", "none", "none", "none", "none"), (1, 32, 5, 5)),
    ("weights only", nn.Conv2d(32, 48, 3), BinarySpec("float", shortcut="none"), (1, 32, 5, 5)),
    ("conv1d 1", nn.Conv1d(64, 192, 1), BinarySpec(activation_scale="none", shortcut="none"), (2, 64, 16)),
    ("conv1d 3", nn.Conv1d(40, 40, 3, stride=2, padding=1), FULL, (2, 40, 9)),
    ("linear", nn.Linear(128, 65), FULL, (3, 128)),
    ("linear tokens", nn.Linear(40, 80), FULL, (2, 9, 40)),
    ("linear, no shortcut", nn.Linear(96, 32), BinarySpec(shortcut="none"), (5, 96)),
]


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize(("original", "spec", "shape"), [c[1:] for c in LAYERS], ids=[c[0] for c in LAYERS])
def test_whole_layers_agree_to_rounding(
    original: nn.Module, spec: BinarySpec, shape: tuple[int, ...], planes: int
) -> None:
    if spec.activations == "binary":
        spec = dataclasses.replace(spec, planes=planes)
    layer = layer_of(original, spec)
    x = random(shape, 7)
    if spec.activations == "binary":
        signs = NumbaBackend().signs(layer.tensors, x)
        assert torch.equal(signs, TorchBackend().signs(layer.tensors, x))
    expected = TorchBackend().run(layer.tensors, x)
    result = NumbaBackend().run(layer.tensors, x)
    assert result.shape == expected.shape and result.dtype == torch.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6 * scale)
