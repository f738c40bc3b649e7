"""Items of a convolution: how pixels and filters are shared out, by the form of the inner loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bidm_cli.packed.cpu.codegen.isa import MATRIX_DEPTH, MATRIX_PIXELS
from bidm_cli.packed.cpu.ops.structs import CONV_BLOCK, MATRIX_TILES, PAIRED_BYTES
from bidm_cli.packed.cpu.ops.weights import CpuWeights
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES

PER_THREAD = 4
"""Items that a thread should find, so that none waits long for the others at the end."""


def conv_items(
    weights: CpuWeights, out_size: tuple[int, int, int], threads: int
) -> tuple[dict[str, int], Tensor | None]:
    """Fields of CONV_ARGS: groups of filters, items, and for a matrix unit its tiles.

    Args:
        out_size: (images, H', W'). threads: most that will work on it.

    Returns:
        The fields, and a workspace that they point to.
    """
    groups, planes = len(weights.words), weights.planes
    wanted = PER_THREAD * torch.get_num_threads()
    if weights.tile.multiplies:
        count, fields, windows = _matrix_tiles(weights, out_size, threads)
        block = max(1, 2 // planes)  # two tiles or planes are multiplied at once
        wanted = wanted if windows is None else wanted // 2  # each item copies its windows
    else:
        count, fields, windows = math.prod(out_size), {}, None
        block = _pixels(weights, count, wanted)
    step = _group_step(-(-count // block), groups, wanted)
    return {**fields, "groups": groups, "block": block, "group_step": step}, windows


def _matrix_tiles(
    weights: CpuWeights, out_size: tuple[int, int, int], threads: int
) -> tuple[int, dict[str, int], Tensor | None]:
    """(tiles of pixels, fields, workspace): tiles within rows, or of any pixels with room for copies."""
    images, height, width = out_size
    if width % MATRIX_PIXELS == 0 or width >= 4 * MATRIX_PIXELS:
        row_tiles = -(-width // MATRIX_PIXELS)
        return images * height * row_tiles, {"row_tiles": row_tiles}, None
    tile_bytes = weights.words.shape[1] * MATRIX_PIXELS * MATRIX_DEPTH
    # Plans of similar size share it.
    size = 1 << (threads * MATRIX_TILES * tile_bytes - 1).bit_length()
    windows = WORKSPACES.get(("windows", size), lambda: torch.empty(size, dtype=torch.uint8))
    fields = {"windows": windows.data_ptr(), "window_bytes": tile_bytes}
    return -(-math.prod(out_size) // MATRIX_PIXELS), fields, windows


def _pixels(weights: CpuWeights, pixels: int, wanted: int) -> int:
    """Pixels per item: enough to reuse weights, few enough for all threads; each has a row in each plane."""
    groups, planes = len(weights.words), weights.planes
    most_rows = CONV_BLOCK
    if weights.tile.pairs:
        window = weights.words[0].numel() // (4 * weights.tile.filters)
        most_rows = min(CONV_BLOCK, 2 * (PAIRED_BYTES // (8 * window)))
    most = max(1, most_rows // planes)
    step = min(most, weights.tile.rows // math.gcd(weights.tile.rows, planes))  # so that they fill tiles
    block = min(most // step * step, -(-pixels // step) * step)
    while block > 2 * step and -(-pixels // block) * groups < wanted:
        block //= 2
    return block


def _group_step(blocks: int, groups: int, wanted: int) -> int:
    """Filter groups per item, for as many items as are wanted."""
    splits = min(groups, max(1, -(-wanted // blocks)))
    return -(-groups // splits)
