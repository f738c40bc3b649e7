"""Conv kernel for machines with a matrix unit: products of signs as 8-bit numbers, and the usual epilogue.

    n = sum over the window's channels of x s,    D = correction - 2 n

with x = 1 for a positive activation, else 0, and s = -1 for a positive weight, else 1. The zeros of taps
outside the image add nothing, so the correction is the sum of s over the taps inside. All else is as in
:mod:`bidm_cli.packed.cpu.ops.conv_kernel`, D as exact.

An item is up to 32 rows, a pixel's window in one plane each, and some groups of filters. Windows become bytes
part by part, as much as stays in the first-level cache while all groups of the item pass; sums of groups
wait in the second-level cache meanwhile.
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
from bidm_cli.packed.cpu.ops.structs import CONV_ARGS, MATRIX_GROUPS, MATRIX_ROWS
from bidm_cli.packed.cpu.runtime.args import Source

PART = 16
"""Steps of 64 channels whose bytes stay in the first-level cache."""

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
def _spread_windows(windows: Any, rows: Any, run: Any, pitch: Any, first: Any, words: Any, into: Any) -> None:
    """Write the words ``first`` to ``first + words - 1`` of each row's window as bytes [steps, 32, 64].

    ``windows``: addresses of the rows' windows, runs of ``run`` words ``pitch`` bytes apart.
    """
    for i in range(rows):
        line = first // run
        at = first - line * run
        source, done = load_long(windows + 8 * i) + line * pitch, 0
        while done < words:
            count = min(run - at, words - done)
            _spread_run(source + 4 * at, count, done, into + DEPTH * i)
            done, at = done + count, 0
            source += pitch
        if words & 1:
            clear_word(into + (words >> 1) * _STEP_BYTES + DEPTH * i + DEPTH // 2)


def make_amx_conv(lanes: int) -> Source:
    """Make the kernel; ``lanes``: filters per vector of the epilogue."""
    filters = 2 * TILE
    part_space, sums_space = PART * _STEP_BYTES, 4 * MATRIX_ROWS * MATRIX_GROUPS * filters

    def conv(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        tables, rows = stack_bytes(TABLE_BYTES), stack_bytes(part_space)
        ring, sums = stack_bytes(RING_BYTES), stack_bytes(sums_space)
        pixels = args.images * args.out_height * args.out_width
        run = args.columns * args.words
        words, pitch = args.rows * run, 4 * args.padded_width * args.words
        steps = (words + _WORDS - 1) // _WORDS
        splits = (args.groups + args.group_step - 1) // args.group_step
        sums_pitch = 4 * args.group_step * filters
        items = (pixels + args.block - 1) // args.block * splits
        item = first_item(pointer, items)
        if item < items:
            open_tiles()
        while item < items:
            block = item // splits
            first = block * args.block
            first_group = (item - block * splits) * args.group_step
            groups = min(args.group_step, args.groups - first_group)
            count = min(args.block, pixels - first)
            locate(args, first, count, tables)
            for step in range(0, steps, PART):
                depth = min(PART, steps - step)
                part = min(_WORDS * depth, words - _WORDS * step)
                _spread_windows(tables, count * args.planes, run, pitch, _WORDS * step, part, rows)
                for group in range(groups):
                    weights = args.weights + 2 * MASK_BYTES * ((first_group + group) * steps + step)
                    multiply_signs(
                        rows, weights, depth, ring, sums + 4 * group * filters, sums_pitch, 1 if step else 0
                    )
            from_filter = first_group * filters
            for channel in range(from_filter, min(from_filter + groups * filters, args.out_channels), lanes):
                found = sums + 4 * (channel - from_filter)
                finish(args, first, count, channel, found, sums_pitch, tables, lanes)
            item = next_item(address_of(pointer))
            if item >= items:
                close_tiles()

    return conv, CONV_ARGS
