from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.format.bits import from_words, pack_bits, to_words, unpack_bits, weight_words

GEOMETRIES = [
    LayerGeometry("conv2d", 3, 2, (1, 2)),
    LayerGeometry("conv2d", 32, 5, (3, 3)),
    LayerGeometry("conv2d", 45, 7, (3, 1)),
    LayerGeometry("conv1d", 33, 4, (1, 3)),
    LayerGeometry("linear", 70, 9),
]


def weight_of(geometry: LayerGeometry) -> torch.Tensor:
    o, c = geometry.out_channels, geometry.in_channels
    shape = {"conv2d": (o, c, *geometry.kernel), "conv1d": (o, c, geometry.kernel[1]), "linear": (o, c)}
    return torch.randn(shape[geometry.kind], generator=torch.Generator().manual_seed(1))


def test_layout_is_little_endian_in_tap_then_channel_order() -> None:
    weight = torch.tensor([[[[1.0, -1.0]], [[-1.0, 1.0]], [[1.0, 0.0]]]])
    # tap 0: + - +, tap 1: - + + (the sign of 0 is +1): bits 1 0 1 0 1 1
    assert pack_bits(weight).tolist() == [[0b110101]]


def test_nan_counts_as_minus_one() -> None:
    assert pack_bits(torch.tensor([[float("nan"), 1.0]])).tolist() == [[0b10]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bits_come_back_as_signs(geometry: LayerGeometry) -> None:
    weight = weight_of(geometry)
    rows = pack_bits(weight)
    assert rows.dtype == torch.uint8
    assert rows.shape == (geometry.out_channels, -(-geometry.fan_in // 8))
    assert torch.equal(unpack_bits(rows, geometry), torch.where(weight >= 0, 1.0, -1.0))


def test_rows_are_what_numpy_packs() -> None:
    weight = weight_of(GEOMETRIES[2])
    bits = (weight.permute(0, 2, 3, 1).reshape(len(weight), -1) >= 0).numpy()
    assert np.array_equal(pack_bits(weight).numpy(), np.packbits(bits, axis=1, bitorder="little"))


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 100])
def test_words_round_trip_with_zero_padding(channels: int) -> None:
    bits = torch.rand(3, channels, generator=torch.Generator().manual_seed(channels)) < 0.5
    words = to_words(bits)
    assert words.shape == (3, -(-channels // 32))
    assert torch.equal(from_words(words, channels), bits)
    padded = from_words(words, words.shape[-1] * 32)
    assert not padded[:, channels:].any()


def test_every_tap_starts_on_a_word() -> None:
    geometry = GEOMETRIES[2]
    weight = weight_of(geometry)
    words = weight_words(pack_bits(weight), geometry)
    assert words.shape == (geometry.out_channels, 3, 2)
    expected = to_words(weight.flatten(2).transpose(1, 2) >= 0)
    assert torch.equal(words, expected)
