"""Binarize and pack, alone and behind a norm."""

from __future__ import annotations

import pytest
import torch

from cupy_kernels.signs import Norm, norm_pack, normalize, pack
from tests.kernels.checks import check_norm_pack, check_pack, words_of_planes
from tests.kernels.machines import Machine

TYPES = [torch.float32, torch.float16, torch.bfloat16]
PLANES = [1, 2, 3]


@pytest.mark.parametrize(
    ("pixels", "channels"),
    [(1, 1), (7, 31), (3, 32), (5, 33), (40, 45), (300, 64), (9, 224), (4, 1000), (3, 1120)],
)
@pytest.mark.parametrize("planes", PLANES)
def test_words_counts_and_magnitudes(any_machine: Machine, pixels: int, channels: int, planes: int) -> None:
    check_pack(any_machine, pixels, channels, planes=planes)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("channels", [45, 96])
def test_other_types_of_activations(
    any_machine: Machine, channels: int, dtype: torch.dtype, planes: int
) -> None:
    check_pack(any_machine, 20, channels, dtype, planes)


def test_zero_is_plus_one_and_nan_is_minus_one(any_machine: Machine) -> None:
    x = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45]])
    (x,) = any_machine.put(x)
    assert pack(any_machine.launcher, x).words.tolist() == [[[0b0101011]]]


def test_every_step_of_the_chain_is_rounded_to_float32(any_machine: Machine) -> None:
    """z = I + tau and z - delta b lose digits, by which later signs differ from those of exact sums."""
    x = torch.tensor([[2.0**-24, 2.0**-24, 1.0, -1.0, float("nan")]])
    tau = torch.tensor([1.0, 1.0, 2.0**-24, 0.0, 0.0])
    delta = torch.tensor([1.0, 1.0 + 2.0**-23, 1.0 + 2.0**-23, -1.0, 1.0])
    thresholds = torch.stack([tau, delta])
    packed = pack(any_machine.launcher, *any_machine.put(x, thresholds))
    assert packed.words.tolist() == [[[0b00111], [0b00001]]]
    assert torch.equal(packed.words.cpu(), words_of_planes(x, thresholds))


def test_an_address_that_is_not_aligned(any_machine: Machine) -> None:
    """Eight channels are loaded at once only where the address allows it."""
    (buffer,) = any_machine.put(torch.randn(64 * 5 + 1, generator=torch.Generator().manual_seed(0)))
    x = buffer[1:].reshape(5, 64)
    found, expected = pack(any_machine.launcher, x), pack(any_machine.launcher, x.clone())
    assert torch.equal(found.words, expected.words) and torch.equal(found.counts, expected.counts)


def test_nothing_to_pack(any_machine: Machine) -> None:
    (x,) = any_machine.put(torch.empty(0, 4, 4, 40))
    assert pack(any_machine.launcher, x).words.shape == (0, 4, 4, 1, 2)
    assert norm_pack(any_machine.launcher, x, Norm(8, 1e-5))[0].counts.shape == (0, 4, 4, 1)


@pytest.mark.parametrize(
    ("images", "pixels", "channels", "groups"),
    [(2, 64, 32, 32), (1, 1, 64, 32), (3, 35, 45, 9), (1, 500, 96, 32), (2, 7, 640, 32), (1, 9, 1120, 32)],
)
@pytest.mark.parametrize("planes", PLANES)
def test_norm_silu_and_signs(
    any_machine: Machine, images: int, pixels: int, channels: int, groups: int, planes: int
) -> None:
    check_norm_pack(any_machine, images, pixels, channels, groups, planes=planes)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_film_in_every_type(any_machine: Machine, dtype: torch.dtype, planes: int) -> None:
    check_norm_pack(any_machine, 2, 30, 64, 32, dtype, film=True, planes=planes)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_narrow_types_are_the_float32_result_rounded(any_machine: Machine, dtype: torch.dtype) -> None:
    x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    (x,) = any_machine.put(x)
    exact = normalize(any_machine.launcher, x.float(), Norm(8, 1e-5, silu=True))
    assert torch.equal(normalize(any_machine.launcher, x, Norm(8, 1e-5, silu=True)), exact.to(dtype))


def test_norm_alone(any_machine: Machine) -> None:
    check_norm_pack(any_machine, 2, 30, 40, 8, silu=False)


def test_a_large_mean_does_not_drown_the_variance(any_machine: Machine) -> None:
    """Sums of squares in float32 would lose it: 3000^2 has an ulp of 1."""
    x = (torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(0)) + 3000.0).to(any_machine.device)
    _, values = norm_pack(any_machine.launcher, x, Norm(8, 1e-6), keep=True)
    assert values is not None
    assert abs(float(values.std()) - 1.0) < 1e-3 and abs(float(values.mean())) < 1e-2
