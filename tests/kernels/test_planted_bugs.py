"""Do the checks catch mistakes? Each test changes a kernel's source and expects the check to fail.

Every launch is a program of its own here: a planted bug may well crash. What counts as caught is a wrong
result, a report of divergence, a crash, or a sanitizer's report, in one of the two schedules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cupy_kernels.kernel import FOLDER
from cupy_kernels.tiles import Tile
from tests.kernels.checks import Case, check_epilogue, check_norm_pack, check_pack, check_product
from tests.kernels.host_launcher import KernelFailure, available
from tests.kernels.machines import Machine, host

pytestmark = pytest.mark.skipif(not available(), reason="no g++ here")

SMALL = Case(40, 34, height=6, width=5, images=2)
# Two tiles for one block, two tiles of 16 pixels a warp: every barrier separates something.
TILE = Tile(4, 2, 1, 8, 4)


def check_of_pack(machine: Machine) -> None:
    check_pack(machine, 37, 45)


def check_of_norm_pack(machine: Machine) -> None:
    check_norm_pack(machine, 2, 20, 40, 8)


def check_of_conv_popc(machine: Machine) -> None:
    check_epilogue(machine, SMALL, "popc")


def check_of_conv_bmma(machine: Machine) -> None:
    check_epilogue(machine, SMALL, TILE)


def check_of_planes_in_pack(machine: Machine) -> None:
    check_pack(machine, 37, 45, planes=3)


def check_of_planes_in_norm_pack(machine: Machine) -> None:
    check_norm_pack(machine, 2, 20, 40, 8, planes=3)


def check_of_planes_in_conv_popc(machine: Machine) -> None:
    check_epilogue(machine, SMALL, "popc", planes=3)


def check_of_planes_in_conv_bmma(machine: Machine) -> None:
    check_epilogue(machine, SMALL, TILE, planes=3)


def check_of_last_filter_of_planes(machine: Machine) -> None:
    check_product(machine, Case(32, 33, images=1, height=2, width=2), "popc", planes=2)


def check_of_last_filter(machine: Machine) -> None:
    check_product(machine, Case(32, 33, images=1, height=2, width=2), "popc")


def check_of_many_small_tiles(machine: Machine) -> None:
    """25 of 2 x 2 pixels an image, two images a tile, dealt out to several blocks."""
    machine.launcher.multiprocessors = 3  # and not one, as for the other checks
    check_product(machine, Case(40, 45, images=5, height=9, width=10), Tile(7, 4, 2, 2, 2))


def check_of_pack_of_many_channels(machine: Machine) -> None:
    """Five rounds of bytes a lane, where four are loaded at once."""
    check_pack(machine, 2, 1120)


Check = Callable[[Machine], None]
CHECKS: dict[str, Check] = {
    "pack.cu": check_of_pack,
    "norm_pack.cu": check_of_norm_pack,
    "conv_popc.cu": check_of_conv_popc,
    "conv_bmma.cu": check_of_conv_bmma,
}
PLANE_CHECKS: dict[str, Check] = {
    "pack.cu": check_of_planes_in_pack,
    "norm_pack.cu": check_of_planes_in_norm_pack,
    "conv_popc.cu": check_of_planes_in_conv_popc,
    "conv_bmma.cu": check_of_planes_in_conv_bmma,
}


@dataclass(frozen=True)
class Bug:
    """Replaces the ``occurrence``-th ``right`` by ``wrong`` in a file's source, its .cuh files included."""

    file: str
    right: str
    wrong: str
    occurrence: int = 0

    def __call__(self, file: str, source: str) -> str:
        if file != self.file and f'#line 1 "{self.file}"' not in source:
            return source
        parts = source.split(self.right)
        assert len(parts) > self.occurrence + 1, (
            f"{self.right!r} is not in {self.file}: the bug cannot be planted"
        )
        cut = self.occurrence + 1
        return self.right.join(parts[:cut]) + self.wrong + self.right.join(parts[cut:])


def _barriers() -> list[Bug]:
    """Every barrier of every kernel, removed."""
    return [
        Bug(file, call, ";", occurrence)
        for file in CHECKS
        for call in ("__syncthreads();", "__syncwarp();")
        for occurrence in range((FOLDER / file).read_text().count(call))
    ]


def caught(bug: Bug, check: Check, sanitize: bool = False) -> str:
    """How the check failed, in the first schedule where it did; empty if the bug went through."""
    for schedule in (0, 1):
        machine = host(
            schedule=schedule,
            process=True,
            sanitize=sanitize,
            change=bug,
            multiprocessors=1,
            shared_memory=99 * 1024,
        )
        try:
            check(machine)
        except KernelFailure as failure:
            return str(failure)
        except AssertionError as failure:
            return f"wrong result: {failure}"
    return ""


@pytest.mark.parametrize("check", [*CHECKS.values(), *PLANE_CHECKS.values()], ids=lambda c: c.__name__)
def test_without_a_bug_the_checks_pass(check: Check) -> None:
    """Otherwise the tests below would say nothing."""
    for schedule in (0, 1):
        check(host(schedule=schedule, process=True, multiprocessors=1, shared_memory=99 * 1024))


@pytest.mark.parametrize("checks", [CHECKS, PLANE_CHECKS], ids=["one plane", "planes"])
@pytest.mark.parametrize("bug", _barriers(), ids=lambda b: f"{b.file} {b.right[:-1]} {b.occurrence}")
def test_removed_barriers(bug: Bug, checks: dict[str, Check]) -> None:
    # That of pack.cu is for what further planes read.
    needed = bug.file != "pack.cu" or checks is PLANE_CHECKS
    assert bool(caught(bug, checks[bug.file])) == needed


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        (Bug("pack.cu", "bool exists = pixel < args.pixels;", "bool exists = true;"), check_of_pack),
        (
            Bug("norm_pack.cu", "bool exists = within < args.pixels;", "bool exists = true;"),
            check_of_norm_pack,
        ),
        (
            Bug("conv_popc.cu", "exists && filter < args.out_channels ?", "exists ?"),
            check_of_last_filter,
        ),
        (
            Bug("conv.cuh", "bool second = channel + 1 < args.out_channels;", "bool second = true;", 1),
            check_of_last_filter,
        ),
        (
            Bug("conv.cuh", "if (channel >= args.out_channels) return 0;", ""),
            check_of_last_filter_of_planes,
        ),
        (Bug("signs.cuh", "i < OFFSETS;", "i < OFFSETS + 1;"), check_of_planes_in_pack),
        (
            Bug("signs.cuh", "channel < channels ? thresholds[row", "true ? thresholds[row"),
            check_of_planes_in_pack,
        ),
    ],
    ids=["pack.cu", "norm_pack.cu", "conv_popc.cu", "conv.cuh", "filters of planes", "offsets", "deltas"],
)
def test_missing_bounds_checks(bug: Bug, check: Check) -> None:
    """Reads and writes beyond the end need not change a result; AddressSanitizer names the line."""
    report = caught(bug, check, sanitize=True)
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert re.search(rf" in \w+.*/{bug.file}:\d+", report)


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        (Bug("conv_popc.cu", "|| x < 0 || x >= args.width", ""), check_of_conv_popc),
        (Bug("conv_bmma.cu", "&& x >= 0 && x < args.width", ""), check_of_conv_bmma),
        (Bug("conv.cuh", "&& source_x >= 0 && source_x < args.width", ""), check_of_conv_popc),
    ],
    ids=["conv_popc.cu", "conv_bmma.cu", "conv.cuh"],
)
def test_missing_border_tests(bug: Bug, check: Check) -> None:
    assert caught(bug, check)


@pytest.mark.parametrize(
    "bug",
    [
        Bug(
            "conv_bmma.cu",
            "bmma(matches[m][n], a[m], b)",
            "Word c[4] = {a[m][0], a[m][2], a[m][1], a[m][3]}; bmma(matches[m][n], c, b)",
        ),
        Bug("conv_bmma.cu", "make_int2(d[2], d[3])", "make_int2(d[3], d[2])"),
        Bug(
            "conv_bmma.cu",
            "Word b[2] = {column[8 * n * FILTER_STRIDE], column[8 * n * FILTER_STRIDE + 4]}",
            "Word b[2] = {column[8 * n * FILTER_STRIDE + 4], column[8 * n * FILTER_STRIDE]}",
        ),
        Bug("conv_popc.cu", "pixel[p] & filter[f]", "pixel[f] & filter[p]"),
    ],
    ids=["rows and halves of A", "results", "halves of B", "pixels and filters"],
)
def test_swapped_fragments(bug: Bug) -> None:
    assert caught(bug, CHECKS[bug.file])


@pytest.mark.parametrize("check", [check_of_pack, check_of_norm_pack])
def test_wrong_polarity(check: Check) -> None:
    assert caught(Bug("signs.cuh", "if (values[i] >= limits[i])", "if (!(values[i] >= limits[i]))"), check)


@pytest.mark.parametrize("check", [check_of_pack, check_of_norm_pack])
def test_wrong_sign_of_the_threshold(check: Check) -> None:
    assert caught(Bug("signs.cuh", "-thresholds[channel]", "thresholds[channel]"), check)


@pytest.mark.parametrize(
    "bug",
    [
        Bug("conv_popc.cu", "x += tap % args.columns", "x += (tap + 1) % args.columns"),
        Bug("conv_bmma.cu", "x = tap % COLUMNS;", "x = (tap + 1) % COLUMNS;"),
        Bug(
            "conv.cuh",
            "x * args.stride_x - args.left + column;",
            "x * args.stride_x - args.left + column + 1;",
        ),
    ],
    ids=["conv_popc.cu", "conv_bmma.cu", "conv.cuh"],
)
def test_tap_off_by_one(bug: Bug) -> None:
    assert caught(bug, CHECKS.get(bug.file, check_of_conv_popc))


@pytest.mark.parametrize(
    "bug",
    [
        Bug(
            "conv_bmma.cu",
            "image < args.tile_images ? tile.image + image : args.images",
            "tile.image + image",
        ),
        Bug("conv_bmma.cu", "index / (across * down) * args.tile_images", "index / (across * down)"),
    ],
    ids=["rows beyond the tile's own", "first image of a tile"],
)
def test_tiles_that_overlap(bug: Bug) -> None:
    """Right results may follow wrong ones into the same place: it depends on the order of blocks."""
    check_of_many_small_tiles(host(process=True))
    assert caught(bug, check_of_many_small_tiles)


@pytest.mark.parametrize("check", [check_of_planes_in_pack, check_of_planes_in_norm_pack])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("int channel = 8 * (i % BYTES) + i / BYTES % 8", "int channel = i % (8 * BYTES)"),
        ("row = 1 + i / (8 * BYTES)", "row = i / (8 * BYTES)"),
        ("[((plane - 1) * 8 + i) * BYTES]", "[i * BYTES]"),
        ("[((plane - 1) * 8 + i) * BYTES]", "[((plane - 1) * 8 + 7 - i) * BYTES]"),
        ("reached ? offset : -offset", "offset"),
        ("      reached = z >= 0.0f;\n      if (reached)", "      if (z >= 0.0f)"),
        ("(size_t)pixel * PLANES + plane", "(size_t)pixel + plane"),
        ("out.counts[pixel * PLANES + plane]", "out.counts[pixel + plane]"),
    ],
    ids=[
        *("channels of delta", "tau for delta", "plane of delta", "delta of another channel"),
        *("delta without its sign", "sign of the first plane", "stride of words", "stride of counts"),
    ],
)
def test_planes_that_are_packed_wrongly(right: str, wrong: str, check: Check) -> None:
    assert caught(Bug("signs.cuh", right, wrong), check)


@pytest.mark.parametrize("file", ["pack.cu", "norm_pack.cu"])
def test_delta_of_another_byte(file: str) -> None:
    assert caught(Bug(file, "offsets + channel / 8", "offsets"), PLANE_CHECKS[file])


@pytest.mark.parametrize("check", [check_of_planes_in_conv_popc, check_of_planes_in_conv_bmma])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("{args.plane_scale_1, args.plane_scale_2}", "{args.plane_scale_2, args.plane_scale_1}"),
        ("scales[plane - 1], next", "scales[0], next"),
        ("__fadd_rn(total, __fmul_rn(scales[plane - 1], next))", "__fmaf_rn(scales[plane - 1], next, total)"),
        ("dot(args, terms, plane, channel, matches[plane])", "dot(args, terms, plane, channel, matches[1])"),
        ("terms.ones[plane] + correction", "terms.ones[0] + correction"),
        ("args.counts[source * PLANES + plane]", "args.counts[source + plane]"),
    ],
    ids=[
        *("g of the other plane", "one g for all", "fused multiply-add"),
        *("popcount of another plane", "ones of the first plane", "stride of counts"),
    ],
)
def test_planes_that_are_added_wrongly(right: str, wrong: str, check: Check) -> None:
    assert caught(Bug("conv.cuh", right, wrong), check)


@pytest.mark.parametrize(
    "bug",
    [
        Bug("conv_popc.cu", "(pixel * PLANES + plane) *", "(pixel + plane) *"),
        Bug("conv_popc.cu", "(plane * DEPTH + j) * STRIDE", "j * STRIDE"),
        Bug("conv_bmma.cu", "pixels + plane * WORDS", "pixels + plane * PIXEL_STRIDE"),
        Bug("conv_bmma.cu", "[n], a[plane][m], b)", "[n], a[0][m], b)"),
        Bug("conv_bmma.cu", "args.width + x) * PIXEL_WORDS", "args.width + x) * WORDS"),
        Bug("conv_bmma.cu", "rows[e / 2]", "rows[0]"),
        Bug("conv_bmma.cu", "8 * n + 2 * t + e % 2, of_planes", "8 * n + 2 * t, of_planes"),
    ],
    ids=[
        *("stride of words, popc", "plane in shared memory, popc", "plane in shared memory, bmma"),
        *("plane of A", "stride of words, bmma", "pixel of a result", "filter of a result"),
    ],
)
def test_planes_that_are_mixed_up(bug: Bug) -> None:
    assert caught(bug, PLANE_CHECKS[bug.file])


def test_rounds_beyond_the_last() -> None:
    bug = Bug("pack.cu", "if (!exists || start + i >= ROUNDS) continue;", "if (!exists) continue;")
    assert caught(bug, check_of_pack_of_many_channels, sanitize=True)


def test_a_bug_that_cannot_be_planted_is_an_error() -> None:
    """Otherwise a renamed variable would turn these tests into nothing."""
    with pytest.raises(AssertionError, match="cannot be planted"):
        check_of_pack(host(change=Bug("pack.cu", "no such text", "")))
