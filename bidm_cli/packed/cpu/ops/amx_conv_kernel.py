"""Conv kernel for machines with a matrix unit: products of signs as 8-bit numbers, and the usual epilogue.

    n = sum over the window's channels of x s,    D = correction - 2 n

with x = 1 for a positive activation, else 0, and s = -1 for a positive weight, else 1. The zeros of taps
outside the image add nothing, so the correction is the sum of s over the taps inside. All else is as in
:mod:`bidm_cli.packed.cpu.ops.conv_kernel`, D as exact.

The activations lie in memory as bytes. A tile is 16 neighbouring pixels in one plane: of a row of the image,
where windows begin equally far apart and the matrix unit reads them as they lie, or any, whose windows are
copied. An item is one or two tiles of pixels in all planes, and some groups of filters.
"""

from __future__ import annotations

from typing import Any

from numba import carray, njit

from bidm_cli.packed.cpu.codegen.amx import (
    DEPTH,
    MASK_BYTES,
    RING_BYTES,
    TILE,
    close_tiles,
    multiply_signs,
    open_tiles,
)
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    arrive,
    copy_64_bytes,
    first_item,
    load_long,
    next_item,
    stack_bytes,
    store_long,
)
from bidm_cli.packed.cpu.ops.conv_kernel import TABLE_BYTES, finish, locate
from bidm_cli.packed.cpu.ops.structs import CONV_ARGS, MATRIX_TILES
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, Source

_STEP_BYTES = TILE * DEPTH
"""A step of a tile's windows, copied."""

_FILTERS = 2 * TILE
_SUMS_BYTES = 4 * TILE * _FILTERS
"""A tile's sums."""


@njit(inline="always", error_model="numpy")
def _copy_windows(args: Any, plane: Any, count: Any, tables: Any, steps: Any, into: Any) -> None:
    """Copy a tile's windows, which the first line of ``tables`` locates, to [lines, steps, 16, 64]."""
    for i in range(count):
        window, place = load_long(tables + 8 * (i * args.planes + plane)), into + DEPTH * i
        for line in range(args.rows):
            source = window + line * args.padded_width * args.pixel_bytes
            for step in range(steps):
                copy_64_bytes(source + DEPTH * step, place + (line * steps + step) * _STEP_BYTES)


@njit(inline="always", error_model="numpy")
def _tile_of(args: Any, tile: Any) -> Any:
    """(first pixel, pixels) of a tile of pixels."""
    if args.row_tiles:
        row = tile // args.row_tiles
        x = TILE * (tile - row * args.row_tiles)
        return row * args.out_width + x, min(TILE, args.out_width - x)
    pixels = args.images * args.out_height * args.out_width
    return TILE * tile, min(TILE, pixels - TILE * tile)


@njit(inline="always", error_model="numpy")
def _tile_count(args: Any) -> Any:
    """Tiles of pixels in all images."""
    rows = args.images * args.out_height
    return rows * args.row_tiles if args.row_tiles else (rows * args.out_width + TILE - 1) // TILE


@njit(inline="always", error_model="numpy")
def _prepare(args: Any, first: Any, count: Any, tables: Any, steps: Any, windows: Any, starts: Any) -> None:
    """Tabulate what :func:`locate` does, and where the windows of ``count`` tiles begin, by plane."""
    for i in range(count):
        pixel, pixels = _tile_of(args, first + i)
        here = tables + 8 * TILE * i
        locate(args, pixel, pixels, here)
        for plane in range(args.planes):
            slot = i * args.planes + plane
            start = load_long(here + 8 * plane)
            if args.windows:
                start = windows + slot * args.window_bytes
                _copy_windows(args, plane, pixels, here, steps, start)
            store_long(starts + 8 * slot, start)


def make_amx_conv(lanes: int) -> Source:
    """Make the kernel; ``lanes``: filters per vector of the epilogue."""
    starts_space, sums_space = 8 * MATRIX_TILES, MATRIX_TILES * _SUMS_BYTES

    def conv(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        tables, starts = stack_bytes(TABLE_BYTES), stack_bytes(starts_space)
        ring, sums = stack_bytes(RING_BYTES), stack_bytes(sums_space)
        steps = args.columns * args.pixel_bytes // DEPTH
        pitch, step_pitch = args.pixel_bytes * args.stride_x, DEPTH
        line_pitch = args.pixel_bytes * args.padded_width
        if args.windows:
            pitch, step_pitch, line_pitch = DEPTH, _STEP_BYTES, steps * _STEP_BYTES
        group_bytes = 2 * MASK_BYTES * args.rows * steps
        tiles = _tile_count(args)
        splits = (args.groups + args.group_step - 1) // args.group_step
        items = (tiles + args.block - 1) // args.block * splits
        item = first_item(pointer, items)
        if item >= items:
            return
        thread = arrive(address_of(pointer) + ARRIVALS)
        windows = args.windows + thread * MATRIX_TILES * args.window_bytes
        open_tiles()
        while item < items:
            block = item // splits
            first = block * args.block
            first_group = (item - block * splits) * args.group_step
            count = min(args.block, tiles - first)
            slots = count * args.planes
            _prepare(args, first, count, tables, steps, windows, starts)
            for group in range(first_group, min(first_group + args.group_step, args.groups)):
                for slot in range(0, slots, 2):
                    multiply_signs(
                        load_long(starts + 8 * slot),
                        load_long(starts + 8 * min(slot + 1, slots - 1)),
                        pitch,
                        line_pitch,
                        step_pitch,
                        args.rows,
                        steps,
                        args.weights + group * group_bytes,
                        ring,
                        sums + slot * _SUMS_BYTES,
                        sums + (slot + 1) * _SUMS_BYTES,
                    )
                for i in range(count):
                    pixel, pixels = _tile_of(args, first + i)
                    here, of_tile = tables + 8 * TILE * i, sums + i * args.planes * _SUMS_BYTES
                    end = min((group + 1) * _FILTERS, args.out_channels)
                    for channel in range(group * _FILTERS, end, lanes):
                        found = of_tile + 4 * (channel - group * _FILTERS)
                        finish(args, pixel, pixels, channel, found, 4 * _FILTERS, _SUMS_BYTES, here, lanes)
            item = next_item(pointer, items)
        close_tiles()

    return conv, CONV_ARGS
