"""Binary convolutions in both tiers: integers bit for bit, then the epilogue bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cupy_kernels.conv import ConvShape, ConvWeights, EpilogueInputs, Tier, _paired, convolve
from cupy_kernels.signs import Signs
from cupy_kernels.tiles import MOST_PRODUCTS, ConvSize, Tile, best_tile
from tests.kernels.checks import Case, check_epilogue, check_product, counts_of, random, random_words
from tests.kernels.host_launcher import available
from tests.kernels.machines import Machine, host

CASES = {
    "3x3": Case(32, 32, height=8, width=8, images=2),
    "odd widths and sizes": Case(45, 37, height=7, width=5, images=3),
    "one pixel": Case(1, 1, height=1, width=1),
    "one pixel, many": Case(64, 40, height=1, width=1, images=5),
    "stride 2": Case(7, 70, stride=(2, 2), height=9, width=8, images=2),
    "stride 2, right and bottom": Case(64, 64, stride=(2, 2), padding=(0, 1, 0, 1), height=8, width=8),
    "stride 2, right and bottom, odd": Case(64, 33, stride=(2, 2), padding=(0, 1, 0, 1), height=7, width=2),
    "1x1": Case(130, 96, (1, 1), padding=(0, 0, 0, 0), height=6, width=3, images=2),
    "1x1 stride 2": Case(33, 20, (1, 1), (2, 2), (0, 0, 0, 0), height=5, width=5),
    "5x3": Case(20, 50, (5, 3), (1, 2), (2, 0, 1, 3), images=2, height=6, width=9),
    "2x4 stride 3": Case(40, 16, (2, 4), (3, 1), (5, 4, 3, 2), height=3, width=2),
    "no padding": Case(256, 30, padding=(0, 0, 0, 0), height=5, width=6),
    "7x7": Case(96, 24, (7, 7), (1, 1), (3, 3, 3, 3), height=4, width=4),
    "larger than a tile": Case(32, 70, height=19, width=21, images=2),
}

TIERS: list[Tier] = ["popc", "bmma"]
PLANES = [1, 2, 3]


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products(any_machine: Machine, case: Case, tier: Tier, planes: int) -> None:
    check_product(any_machine, case, tier, planes=planes)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("tier", TIERS)
def test_all_sixteen_border_classes(any_machine: Machine, tier: Tier, planes: int) -> None:
    """Which of the four sides are inside: images one pixel high or wide have classes of their own."""
    seen = set()
    for height in (1, 2, 3):
        for width in (1, 2, 3):
            case = Case(40, 9, height=height, width=width, images=2)
            check_product(any_machine, case, tier, seed=height * width, planes=planes)
            seen |= {
                (y > 0, y < height - 1, x > 0, x < width - 1) for y in range(height) for x in range(width)
            }
    assert len(seen) == 16


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("seed", "planes"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 3)])
def test_random_geometries(any_machine: Machine, seed: int, planes: int, tier: Tier) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    kernel = (pick(1, 4), pick(1, 4))
    padding = (pick(0, 2), pick(0, 2), pick(0, 2), pick(0, 2))
    case = Case(
        pick(1, 100),
        pick(1, 80),
        kernel,
        (pick(1, 3), pick(1, 3)),
        padding,
        pick(1, 3),
        pick(4, 9),
        pick(4, 9),
    )
    check_product(any_machine, case, tier, seed, planes=planes)


@pytest.mark.parametrize(
    ("tile", "planes"),
    [
        (Tile(4, 1, 2, 4, 8), 1),
        (Tile(7, 1, 1, 8, 16), 1),
        (Tile(8, 2, 1, 16, 8), 1),
        (Tile(7, 4, 1, 2, 2), 1),
        (Tile(8, 4, 4, 4, 8), 1),
        (Tile(7, 2, 1, 2, 2), 2),
        (Tile(8, 2, 4, 4, 8), 2),
        (Tile(8, 1, 1, 8, 16), 3),
        (Tile(7, 2, 1, 16, 8), 3),
    ],
    ids=str,
)
def test_every_shape_of_tile(any_machine: Machine, tile: Tile, planes: int) -> None:
    """Tiles that reach over edges, hold several images, or have fewer than 128 pixels; several a block."""
    # 25 tiles of 2 x 2 an image: a tile that also wrote to the next image would do so from another block.
    check_product(any_machine, Case(40, 45, images=5, height=9, width=10), tile, planes=planes)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_epilogue(any_machine: Machine, dtype: torch.dtype, tier: Tier, planes: int) -> None:
    check_epilogue(any_machine, Case(45, 38, height=6, width=5, images=2), tier, dtype, planes=planes)


@pytest.mark.parametrize("planes", [2, 3])
@pytest.mark.parametrize("tier", TIERS)
def test_planes_of_odd_shortcuts(any_machine: Machine, tier: Tier, planes: int) -> None:
    check_epilogue(any_machine, Case(33, 37, images=2), tier, shortcut=80, planes=planes)


def test_planes_that_the_weights_are_not_for() -> None:
    words, weights = random_words(1, 2, 3, 2, channels=32), random_words(8, 1, channels=32, seed=1)
    layer = ConvWeights(ConvShape(32, 8), weights)
    with pytest.raises(ValueError, match="2 planes"):
        convolve(host().launcher, Signs(words, counts_of(words), None), layer, torch.float32)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shortcut", [10, 19, 37, 74, 80, 148])
def test_shortcuts_of_other_widths(any_machine: Machine, shortcut: int, tier: Tier) -> None:
    """37 filters: the shortcut's channels repeat, evenly or not, or several are averaged, evenly or not."""
    check_epilogue(any_machine, Case(33, 37, images=2), tier, shortcut=shortcut, everything=False)


@pytest.mark.parametrize("shortcut", [20, 40, 80, 100])
def test_shortcuts_of_even_widths(any_machine: Machine, shortcut: int) -> None:
    check_epilogue(any_machine, Case(33, 40, images=2), "popc", torch.float16, shortcut=shortcut)


@pytest.mark.parametrize("which", ["shortcut", "residual"])
def test_addresses_that_are_not_aligned(any_machine: Machine, which: str) -> None:
    """Channels are read two at a time only where the address allows it."""
    words, weights = random_words(1, 2, 3, 1, channels=32), random_words(8, 1, channels=32, seed=1)
    words, counts, weights = any_machine.put(words, counts_of(words), weights)
    (buffer,) = any_machine.put(random(6 * 8 + 1).half())

    def run(tensor: torch.Tensor) -> torch.Tensor:
        layer = ConvWeights(ConvShape(32, 8), weights)
        extras = EpilogueInputs(shortcut_scale=0.5, **{which: tensor})
        return convolve(any_machine.launcher, Signs(words, counts, None), layer, torch.float16, extras)

    tensor = buffer[1:].reshape(1, 2, 3, 8)
    assert tensor.data_ptr() % 4 and not tensor.clone().data_ptr() % 4
    assert _paired(8, EpilogueInputs(**{which: tensor.clone()})) and not _paired(
        8, EpilogueInputs(**{which: tensor})
    )
    assert torch.equal(run(tensor), run(tensor.clone()))


@pytest.mark.parametrize("tier", TIERS)
def test_pointwise_layers_know_their_image(any_machine: Machine, tier: Tier) -> None:
    """Their pixels are one line for the kernel; offsets are still those of each image."""
    case = Case(64, 48, (1, 1), padding=(0, 0, 0, 0), images=3, height=5, width=6)
    check_epilogue(any_machine, case, tier)
    check_epilogue(any_machine, case, tier, planes=2)


@pytest.mark.parametrize("planes", PLANES)
def test_bmma_by_shuffles(planes: int) -> None:
    """What GPUs without the instruction do."""
    if not available():
        pytest.skip("no g++ here")
    check_product(host(macros=("EMULATE_BMMA",)), CASES["odd widths and sizes"], "bmma", planes=planes)


def test_a_layer_too_large_for_shared_memory_takes_the_other_tier() -> None:
    if not available():
        pytest.skip("no g++ here")
    case = Case(600, 8, (7, 7), padding=(3, 3, 3, 3), height=2, width=2)
    small = host(shared_memory=48 * 1024)
    check_product(small, case, "auto")
    assert small.launcher.launched == ["conv_popc"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="does not fit"):
        check_product(small, case, "bmma")


@pytest.mark.parametrize(("capability", "kernel"), [(75, "conv_popc"), (80, "conv_bmma"), (120, "conv_bmma")])
def test_the_tier_follows_the_device(capability: int, kernel: str) -> None:
    if not available():
        pytest.skip("no g++ here")
    machine = host(capability=capability)
    check_product(machine, CASES["3x3"], "auto")
    assert machine.launcher.launched == [kernel]  # type: ignore[attr-defined]


@pytest.mark.parametrize("planes", PLANES)
def test_tiles_fit_and_cover_the_layers_of_ldm4(planes: int) -> None:
    """On an A100 and H100 all; 99 KiB, as consumer GPUs have, do for layers of the network's own widths.

    With more planes the lower levels' joined layers do not fit into an A100, nor the lowest level's own width
    into 99 KiB: these go to the CUDA cores.
    """
    own_widths = [(64, 224, 224), (32, 448, 448), (16, 672, 672), (8, 896, 896)]
    joined = [(64, 672, 224), (32, 1120, 448), (16, 1568, 672), (8, 1792, 896)]
    several = planes > 1
    for shared, layers in (
        (227 * 1024, own_widths + joined),
        (163 * 1024, own_widths + (joined[:2] if several else joined)),
        (99 * 1024, own_widths[:3] if several else own_widths),
    ):
        for size, channels, filters in layers:
            for batch in (1, 16, 64):
                layer = ConvSize(-(-channels // 32), (3, 3), (1, 1), batch, size, size, filters, planes)
                tile = best_tile(layer, 132, shared)
                assert tile is not None and tile.shared_memory(layer) <= shared
                assert tile.filter_tiles * tile.warps * planes <= MOST_PRODUCTS
                assert tile.boxes(layer) * 128 <= 2 * max(128, batch * size * size)


def test_a_tile_is_no_longer_than_a_place_can_say() -> None:
    """128 pixels at a stride of 33 would reach over 4192 columns of input, and fit into shared memory."""
    size = ConvSize(1, (1, 1), (1, 33), 1, 1, 128, 8)
    assert Tile(4, 1, 1, 1, 128).shared_memory(size) < 227 * 1024
    assert not Tile(4, 1, 1, 1, 128).fits(size, 227 * 1024)
    tile = best_tile(size, 1, 227 * 1024)
    assert tile is not None and max(tile.window(size)) < 4096


def test_corrections_are_counted_from_the_filters() -> None:
    shape = ConvShape(40, 3, (3, 3), (1, 1), (1, 1, 1, 1))
    words = random_words(3, 9, channels=40)
    borders = ConvWeights(shape, words).borders(4, 4)
    assert borders.corrections.shape == (9, 3) and borders.corrections.dtype == torch.int32
    ones = [[sum(bin(w & 0xFFFFFFFF).count("1") for w in tap) for tap in f] for f in words.tolist()]
    inside = 4 if int(borders.row_class[1]) == int(borders.column_class[1]) else -1
    whole = int(borders.row_class[1]) * borders.column_classes + int(borders.column_class[1])
    assert inside == 4 and borders.corrections[whole].tolist() == [9 * 40 - 2 * sum(f) for f in ones]


@pytest.mark.parametrize("other", [(4, 1), (1, 4)])
def test_corrections_belong_to_one_size(other: tuple[int, int]) -> None:
    """A layer may meet images of several sizes."""
    shape, words = ConvShape(40, 3, (3, 3), (1, 1), (1, 1, 1, 1)), random_words(3, 9, channels=40)
    layer = ConvWeights(shape, words)
    layer.borders(4, 4)
    found, expected = layer.borders(*other), ConvWeights(shape, words).borders(*other)
    for name in ("corrections", "row_class", "column_class"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_cases_are_distinct() -> None:
    assert len({dataclasses.astuple(case) for case in CASES.values()}) == len(CASES)
