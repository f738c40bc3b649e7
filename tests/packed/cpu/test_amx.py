"""Convolutions on a matrix unit: tiles within rows, tiles of copied windows, and machines without."""

from __future__ import annotations

import ctypes

import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.cpu.codegen import isa
from bidm_cli.packed.cpu.codegen.isa import Tile, may_use_matrix_unit
from bidm_cli.packed.cpu.ops import kernels
from bidm_cli.packed.cpu.ops.conv import ConvPlan
from bidm_cli.packed.cpu.ops.weights import CpuWeights
from tests.helpers import random
from tests.small_ops import REFERENCE, NumbaOps

TILE = Tile("amx", 16, 32, 2)

needs_amx = pytest.mark.skipif(isa.instruction_set() != "amx", reason="needs a processor with AMX")

SHAPES = [  # channels, filters, images, height, width, kernel, stride, padding
    (64, 33, 2, 3, 16, 3, 1, 1),  # rows of whole tiles
    (96, 64, 1, 5, 32, 3, 2, 1),  # every second pixel, half a step of channels
    (300, 70, 2, 2, 70, 3, 1, 1),  # rows that end within a tile
    (100, 32, 2, 4, 131, 3, 2, 1),
    (32, 32, 1, 4, 64, 1, 1, 0),
    (64, 64, 2, 16, 16, 1, 2, 0),  # rows of half a tile: copied windows
    (40, 7, 1, 6, 48, 5, 1, 2),
    (224, 40, 3, 5, 8, 3, 1, 1),  # tiles over several rows and images
    (24, 5, 1, 1, 3, 3, 2, 1),
]


@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_rows_and_copied_windows_count_as_the_reference(shape: tuple[int, ...], planes: int) -> None:
    channels, filters, images, height, width, kernel, stride, padding = shape
    geometry = LayerGeometry("conv2d", channels, filters, (kernel,) * 2, (stride,) * 2, (padding,) * 4)
    weights = REFERENCE.binarize_pack(random((filters, kernel**2, channels), 1), None)[0]
    offsets, scales = 1 + random((planes - 1, channels), 2), random((planes - 1,), 3)
    arguments = random((images, height, width, channels), 4), random((channels,), 5), offsets, scales
    signs, dots = NumbaOps(TILE).planes_conv2d(*arguments, weights, geometry)
    expected_signs, expected_dots = REFERENCE.planes_conv2d(*arguments, weights, geometry)
    assert torch.equal(signs, expected_signs) and torch.equal(dots, expected_dots)


@needs_amx
@pytest.mark.parametrize("width", [8, 32])
def test_threads_share_the_work(width: int) -> None:
    """Copied windows lie in a workspace of each thread."""
    geometry = LayerGeometry("conv2d", 256, 512, (3, 3), (1, 1), (1, 1, 1, 1))
    weights = REFERENCE.binarize_pack(random((512, 9, 256), 1), None)[0]
    x, results = random((4, width, width, 256), 2), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            plan = ConvPlan(CpuWeights.make(weights, geometry, TILE), (4, width, width))
            out = torch.empty(4, width, width, 512)
            for _ in range(5):
                plan.pack((x,))
                plan.convolve(out)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_system_that_refuses_the_matrix_unit_gets_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, name: str | None) -> None:
            self.syscall = lambda *numbers: -1

    monkeypatch.setattr(ctypes, "CDLL", Refusing)
    features = "+avx512f,+avx512vl,+avx512bw,+avx512vpopcntdq,+amx-int8,+amx-bf16"
    monkeypatch.setattr(isa, "target", lambda: ("x86_64-unknown-linux-gnu", "", features))
    monkeypatch.setattr(isa, "may_use_matrix_unit", may_use_matrix_unit.__wrapped__)
    assert isa.instruction_set.__wrapped__() == "avx512-vpopcntdq"
    monkeypatch.setattr(kernels, "instruction_set", isa.instruction_set.__wrapped__)
    with pytest.raises(BidmError, match="needs a processor with AMX"):
        kernels.conv.__wrapped__(TILE)
