"""Conv kernel for machines with a matrix unit: products of signs as 8-bit numbers, and the usual epilogue.

    n = sum over the window's channels of x s,    D = correction - 2 n

with x = 1 for a positive activation, else 0, and s = -1 for a positive weight, else 1. The zeros of taps
outside the image add nothing, so the correction is the sum of s over the taps inside. All else is as in
:mod:`bidm_cli.packed.cpu.ops.conv_kernel`, D as exact.

An item is up to 32 rows, a pixel's window in one plane each, and some groups of filters. Its windows become
bytes once, which stay in the second-level cache while the groups pass.
"""

from __future__ import annotations

from typing import Any

from numba import carray, njit

from bidm_cli.packed.cpu.codegen.amx import (
    DEPTH,
    MASK_BYTES,
    RING_BYTES,
    TILE,
    clear_word,
    close_tiles,
    multiply_signs,
    open_tiles,
    spread_word,
    spread_words,
)
from bidm_cli.packed.cpu.codegen.vector import address_of, first_item, load_long, next_item, stack_bytes
from bidm_cli.packed.cpu.ops.conv_kernel import TABLE_BYTES, finish, locate
from bidm_cli.packed.cpu.ops.structs import CONV_ARGS, MATRIX_ROWS
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, Source

_WORDS = DEPTH // 32
_STEP_BYTES = MATRIX_ROWS * DEPTH


@njit(inline="always", error_model="numpy")
def _spread_run(source: Any, words: Any, first: Any, into: Any) -> None:
    """Write words of a window as bytes, the first one at the place of word number ``first``.

    ``into``: the window's place in the first step.
    """
    i = 0
    if first & 1:
        spread_word(source, into + (first >> 1) * _STEP_BYTES + DEPTH // 2)
        i = 1
    while i + 1 < words:
        spread_words(source + 4 * i, into + ((first + i) >> 1) * _STEP_BYTES)
        i += 2
    if i < words:
        spread_word(source + 4 * i, into + ((first + i) >> 1) * _STEP_BYTES)


@njit(inline="always", error_model="numpy")
def _spread_windows(args: Any, rows: Any, tables: Any, into: Any) -> None:
    """Write the windows that the first line of ``tables`` locates as bytes [steps, 32, 64]."""
    run, pitch = args.columns * args.words, 4 * args.padded_width * args.words
    words = args.rows * run
    for i in range(rows):
        window, place = load_long(tables + 8 * i), into + DEPTH * i
        for line in range(args.rows):
            _spread_run(window + line * pitch, run, line * run, place)
        if words & 1:
            clear_word(place + (words >> 1) * _STEP_BYTES + DEPTH // 2)


def make_amx_conv(lanes: int) -> Source:
    """Make the kernel; ``lanes``: filters per vector of the epilogue."""
    filters = 2 * TILE
    pitch = 4 * filters
    sums_space = MATRIX_ROWS * pitch

    def conv(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        tables, ring, sums = stack_bytes(TABLE_BYTES), stack_bytes(RING_BYTES), stack_bytes(sums_space)
        pixels = args.images * args.out_height * args.out_width
        steps = (args.rows * args.columns * args.words + _WORDS - 1) // _WORDS
        splits = (args.groups + args.group_step - 1) // args.group_step
        items = (pixels + args.block - 1) // args.block * splits
        item = first_item(pointer, items)
        if item >= items:
            return
        windows = args.windows + next_item(address_of(pointer) + ARRIVALS) * steps * _STEP_BYTES
        open_tiles()
        while item < items:
            block = item // splits
            first = block * args.block
            first_group = (item - block * splits) * args.group_step
            count = min(args.block, pixels - first)
            locate(args, first, count, tables)
            _spread_windows(args, count * args.planes, tables, windows)
            for group in range(first_group, min(first_group + args.group_step, args.groups)):
                multiply_signs(windows, args.weights + 2 * MASK_BYTES * group * steps, steps, ring, sums)
                for channel in range(group * filters, min((group + 1) * filters, args.out_channels), lanes):
                    found = sums + 4 * (channel - group * filters)
                    finish(args, first, count, channel, found, pitch, tables, lanes)
            item = next_item(address_of(pointer))
        close_tiles()

    return conv, CONV_ARGS
