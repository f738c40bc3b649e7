"""Each operation against the torch reference. Checks raise AssertionError; planted bugs must make them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.binary import functional
from bidm_cli.binary.planes import plane_sum, sign_planes
from bidm_cli.binary.sign import sign
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.format.bits import to_words, words_per_tap
from cupy_kernels.conv import ConvShape, ConvWeights, EpilogueInputs, Tier, convolve
from cupy_kernels.signs import Norm, Signs, norm_pack, normalize, pack
from cupy_kernels.tiles import Tile
from tests.kernels.machines import Machine
from tests.small_ops import REFERENCE


@dataclass(frozen=True)
class Case:
    """A convolution: C -> O channels, kernel, stride, padding (left, right, top, bottom), images of H x W."""

    channels: int
    filters: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    images: int = 1
    height: int = 4
    width: int = 5

    @property
    def geometry(self) -> LayerGeometry:
        return LayerGeometry("conv2d", self.channels, self.filters, self.kernel, self.stride, self.padding)

    @property
    def shape(self) -> ConvShape:
        return ConvShape(self.channels, self.filters, self.kernel, self.stride, self.padding)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_words(*shape: int, channels: int, seed: int = 0) -> Tensor:
    """int32 words of ``channels`` random bits, surplus bits 0."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (*shape, words_per_tap(channels)), generator=generator).int()
    if channels % 32:
        words[..., -1] &= (1 << channels % 32) - 1
    return words


def counts_of(words: Tensor) -> Tensor:
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.sum(dim=(-1, -2), dtype=torch.int32)


def random_thresholds(planes: int, channels: int, seed: int) -> Tensor:
    """tau [C], or with delta below it [planes, C]; multiples of 1/16 below 4, which bfloat16 holds, too."""
    rows = random(planes, channels, seed=seed).mul(8).round().clamp(-31, 31) / 16
    return rows[0] if planes == 1 else rows


def words_of_planes(x: Tensor, thresholds: Tensor) -> Tensor:
    """Words [..., planes, ceil(C / 32)] by the reference's chain of signs."""
    tau, *offsets = thresholds.reshape(-1, x.shape[-1])
    return torch.stack([to_words(plane > 0) for plane in sign_planes(x + tau, offsets, sign)], dim=-2)


def check_pack(
    machine: Machine, pixels: int, channels: int, dtype: torch.dtype = torch.float32, planes: int = 1
) -> None:
    """Words and counts bit for bit, magnitudes to rounding; with values on and next to the thresholds."""
    x = random(pixels, channels, seed=1).to(dtype)
    thresholds = random_thresholds(planes, channels, seed=2)
    tau, delta = thresholds.reshape(-1, channels)[[0, -1]].to(dtype)
    if pixels > 1:
        x[0] = -tau
        x[1, ::2], x[1, 1::2] = 0.0, float("nan")
    if pixels > 2:
        x[2] = delta - tau
    words, sums = words_of_planes(x.float(), thresholds), x.float().abs().sum(dim=-1)
    signs = pack(machine.launcher, *machine.put(x, thresholds))
    assert torch.equal(signs.words.cpu(), words)
    assert torch.equal(signs.counts.cpu(), counts_of(words))
    assert signs.magnitudes is not None
    torch.testing.assert_close(signs.magnitudes.cpu(), sums / channels, rtol=1e-5, atol=1e-6, equal_nan=True)


def check_norm_pack(
    machine: Machine,
    images: int,
    pixels: int,
    channels: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    *,
    silu: bool = True,
    film: bool = False,
    mean: float = 0.3,
    planes: int = 1,
) -> None:
    """Values to rounding; signs, counts and magnitudes exactly those of the values that come out."""
    x = (random(images, pixels, channels, seed=3) * 2 + mean).to(dtype)
    gamma, beta = random(channels, seed=4), random(channels, seed=5)
    thresholds = random_thresholds(planes, channels, seed=6)
    scale, shift = (random(images, channels, seed=s).to(dtype) for s in (7, 8))
    v = F.group_norm(x.double().transpose(1, 2), groups, gamma.double(), beta.double(), 1e-5).transpose(1, 2)
    if film:
        v = v * (1 + scale.double()[:, None]) + shift.double()[:, None]
    if silu:
        v = F.silu(v)
    x, gamma, beta, thresholds, scale, shift = machine.put(x, gamma, beta, thresholds, scale, shift)
    norm = Norm(groups, 1e-5, gamma, beta, *((scale, shift) if film else (None, None)), silu=silu)
    signs, values = norm_pack(machine.launcher, x, norm, thresholds, keep=True)
    assert values is not None and values.dtype == dtype and signs.magnitudes is not None
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(values.cpu().double(), v, rtol=tolerance, atol=tolerance)
    assert torch.equal(normalize(machine.launcher, x, norm), values)
    exact = values.cpu().float()
    words, sums = words_of_planes(exact, thresholds.cpu()), exact.abs().sum(dim=-1)
    assert torch.equal(signs.words.cpu(), words)
    assert torch.equal(signs.counts.cpu(), counts_of(words))
    torch.testing.assert_close(signs.magnitudes.cpu(), sums / channels, rtol=1e-5, atol=1e-6)


PLANE_SCALES = (0.37, -0.11)
"""g of the second and third plane; products with it are rounded."""


def random_planes(case: Case, planes: int, seed: int) -> Tensor:
    return random_words(case.images, case.height, case.width, planes, channels=case.channels, seed=seed)


def products(words: Tensor, weights: Tensor, case: Case) -> Tensor:
    """D = D_1 + g_1 D_2 + g_2 D_3 [N, H', W', O], int32 of a single plane, else float32."""
    integers = [REFERENCE.binary_conv2d(plane, weights, case.geometry) for plane in words.unbind(-2)]
    if len(integers) == 1:
        return integers[0]
    return plane_sum([d.float() for d in integers], torch.tensor(PLANE_SCALES[: len(integers) - 1]))


def check_product(machine: Machine, case: Case, tier: Tier | Tile, seed: int = 0, *, planes: int = 1) -> None:
    """D bit for bit."""
    words = random_planes(case, planes, seed)
    weights = random_words(case.filters, case.shape.taps, channels=case.channels, seed=seed + 1)
    expected = products(words, weights, case)
    words, counts, weights = machine.put(words, counts_of(words), weights)
    found = convolve(
        machine.launcher,
        Signs(words, counts, None),
        ConvWeights(case.shape, weights, plane_scales=PLANE_SCALES[: planes - 1]),
        torch.float32,
        integers=planes == 1,
        tier=tier,
    )
    assert torch.equal(found.cpu(), expected)


def check_epilogue(
    machine: Machine,
    case: Case,
    tier: Tier | Tile,
    dtype: torch.dtype = torch.float32,
    *,
    shortcut: int | None = None,
    everything: bool = True,
    planes: int = 1,
) -> None:
    """y bit for bit: magnitudes and scale filters are such that K is exact in any order of summation.

    ``shortcut``: its number of channels; default: the output's.
    """
    out_height, out_width = case.shape.output_size(case.height, case.width)
    pixels = (case.images, out_height, out_width)
    words = random_planes(case, planes, seed=1)
    weights = random_words(case.filters, case.shape.taps, channels=case.channels, seed=2)
    magnitudes = random(case.images, case.height, case.width, seed=3).mul(8).round().abs() / 8
    scale_filter = random(*case.kernel, seed=4).mul(4).round() / 16
    weight_scale, bias = random(case.filters, seed=5).abs(), random(case.filters, seed=6)
    value = random(*pixels, shortcut or case.filters, seed=7).to(dtype)
    offset = random(case.images, case.filters, seed=8).to(dtype)
    residual = random(*pixels, case.filters, seed=9).to(dtype)

    expected = functional.epilogue(
        products(words, weights, case).float().permute(0, 3, 1, 2),
        functional.convolve(magnitudes[:, None], scale_filter[None, None], case.geometry),
        weight_scale,
        bias,
        torch.tensor(-0.7),
        functional.tile_channels(value.float().permute(0, 3, 1, 2), case.filters),
        case.geometry,
    ).permute(0, 2, 3, 1)
    if everything:
        expected = expected + offset.float()[:, None, None]
        expected = expected + residual.float()

    words, counts, magnitudes, value, offset, residual = machine.put(
        words, counts_of(words), magnitudes, value, offset, residual
    )
    tensors = machine.put(weights, scale_filter, weight_scale, bias)
    layer = ConvWeights(case.shape, *tensors, plane_scales=PLANE_SCALES[: planes - 1])
    extras = EpilogueInputs(value, 0.7)
    if everything:
        extras = EpilogueInputs(value, 0.7, offset, residual)
    found = convolve(machine.launcher, Signs(words, counts, magnitudes), layer, dtype, extras, tier=tier)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), expected.to(dtype))
