"""Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, each launch in a program of its own.

All buffers have exactly the size that the kernel was promised, shared memory included.
"""

from __future__ import annotations

import pytest
import torch

from cupy_kernels.conv import Tier
from cupy_kernels.tiles import Tile
from tests.kernels.checks import Case, check_epilogue, check_norm_pack, check_pack
from tests.kernels.host_launcher import available
from tests.kernels.machines import host

pytestmark = pytest.mark.skipif(not available(), reason="no g++ here")

CONVOLUTIONS = [
    Case(45, 37, height=7, width=5, images=2),
    Case(7, 34, stride=(2, 2), padding=(0, 1, 0, 1), height=7, width=4),
    Case(1, 1, height=1, width=1),
]


PLANES = [1, 2, 3]


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize(("pixels", "channels"), [(37, 45), (3, 64), (1, 1), (2, 1120)])
def test_pack(pixels: int, channels: int, planes: int) -> None:
    check_pack(host(sanitize=True), pixels, channels, planes=planes)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize(("pixels", "channels", "groups"), [(21, 45, 9), (5, 64, 32), (2, 1120, 32)])
def test_norm_pack(pixels: int, channels: int, groups: int, planes: int) -> None:
    check_norm_pack(host(sanitize=True), 2, pixels, channels, groups, film=True, planes=planes)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv_popc(case: Case, schedule: int, planes: int) -> None:
    check_epilogue(host(sanitize=True, schedule=schedule), case, "popc", planes=planes)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize(
    ("case", "tile"),
    list(zip(CONVOLUTIONS, [Tile(4, 2, 1, 4, 8), "bmma", Tile(7, 1, 2, 2, 2)], strict=True)),
    ids=str,
)
def test_conv_bmma(case: Case, tile: Tier | Tile, planes: int) -> None:
    check_epilogue(host(sanitize=True, multiprocessors=1), case, tile, torch.float16, planes=planes)


def test_shortcuts() -> None:
    for width in (10, 74, 80):
        check_epilogue(host(sanitize=True), CONVOLUTIONS[0], "popc", shortcut=width)


def test_an_odd_shortcut_of_an_even_layer() -> None:
    """Its channels cannot be read two at a time: a GPU stops at an address that is not aligned."""
    case = Case(33, 38, height=3, width=3)
    check_epilogue(host(sanitize=True), case, "popc", shortcut=19, everything=False)
