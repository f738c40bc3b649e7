"""Attention kernels for machines with a matrix unit: softmax(q k^T scale) v by products of bfloat16 parts.

    s_ij = scale log2(e) q_i k_j,   y_i = sum over j of 2^(s_ij - m_i) v_j / sum over j of 2^(s_ij - m_i)

``amx_arrange`` cuts keys and values into parts and brings them into panels of 32
(:mod:`bidm_cli.packed.cpu.codegen.amx_floats`). ``amx_attend`` takes some blocks of 32 queries and goes
through the keys once, a few panels at a time: the scores of a block, transposed, stay in the first-level
cache, become weights, and are multiplied by the values. m_i is the largest score of the first few panels; it
is only raised, and what was summed up so far scaled, where a later score is larger by more than ``softmax.SLACK``.

Lanes and rows past the end are zeros, but scores of keys past the end are -inf, and so weigh nothing.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.amx import TILE, TILE_BYTES, close_tiles, open_tiles
from bidm_cli.packed.cpu.codegen.amx_floats import BLOCK_BYTES, PART_BYTES, ROW_BYTES, SIDE, multiply_floats
from bidm_cli.packed.cpu.codegen.bfloat import store_parts
from bidm_cli.packed.cpu.codegen.softmax import column_maxima, power_of_two, raised, weigh
from bidm_cli.packed.cpu.codegen.transpose import transpose_tile
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    first_item,
    load_first_floats,
    load_floats,
    next_item,
    splat,
    stack_bytes,
    store,
    store_first,
)
from bidm_cli.packed.cpu.codegen.vector_math import largest
from bidm_cli.packed.cpu.ops.attention_kernel import item_count, place_of
from bidm_cli.packed.cpu.ops.structs import MATRIX_ATTENTION_ARGS, MOST_BLOCKS
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, Source

PANELS = 4
"""Panels of keys whose scores stay in the first-level cache."""

_LANES_BYTES = 4 * TILE


@njit(inline="always", error_model="numpy")
def _cut_rows(source: Any, row: Any, rows: Any, left: Any, factor: Any, into: Any, parts: Any) -> None:
    """Cut 16 rows of up to 32 floats, ``row`` apart, into tiles, one per part; pairs are c and c + 16."""
    for i in range(TILE):
        left_here = left if i < rows else 0
        line = source + 4 * i * row
        first = load_first_floats(line, left_here, TILE) * factor
        second = load_first_floats(line + _LANES_BYTES, left_here - TILE, TILE) * factor
        store_parts(first, second, into + _LANES_BYTES * i, PART_BYTES, parts)


@njit(inline="always", error_model="numpy")
def _transpose_parts(tiles: Any, into: Any, parts: Any) -> None:
    """Transpose a tile of pairs, of each part."""
    for part in range(parts):
        at = part * PART_BYTES
        transpose_tile(tiles + at, _LANES_BYTES, TILE, TILE, into + at, _LANES_BYTES, TILE)


@njit(inline="always", error_model="numpy")
def _arrange_keys(args: Any, image: Any, head: Any, first: Any, count: Any, panel: Any, parts: Any) -> None:
    """Cut 32 keys into a panel."""
    k = args.k + 4 * (image * args.k_image + head * args.k_head + first * args.k_row)
    one = splat(float32(1.0), TILE)
    for c in range(0, args.width, SIDE):
        into = panel + c // SIDE * parts * PART_BYTES
        for i in range(0, SIDE, TILE):
            line = k + 4 * (i * args.k_row + c)
            _cut_rows(line, args.k_row, count - i, args.width - c, one, into + i // TILE * TILE_BYTES, parts)


@njit(inline="always", error_model="numpy")
def _arrange_values(
    args: Any, image: Any, head: Any, first: Any, count: Any, step: Any, pitch: Any, space: Any, parts: Any
) -> None:
    """Cut 32 keys' values into a step of all panels, ``pitch`` bytes apart; pairs are keys j and j + 16."""
    v = args.v + 4 * (image * args.v_image + head * args.v_head + first * args.v_row)
    for c in range(0, args.value_width, TILE):
        left = args.value_width - c
        for j in range(TILE):
            line = v + 4 * (j * args.v_row + c)
            one = load_first_floats(line, left if j < count else 0, TILE)
            other = load_first_floats(line + 4 * TILE * args.v_row, left if j + TILE < count else 0, TILE)
            store_parts(one, other, space + _LANES_BYTES * j, PART_BYTES, parts)
        into = step + c // SIDE * pitch + c // TILE % 2 * TILE_BYTES
        _transpose_parts(space, into, parts)


def make_amx_arrange(score_parts: int, value_parts: int) -> Source:
    """Make the kernel that brings keys and values into panels of so many parts."""
    space_bytes = PART_BYTES * value_parts

    def amx_arrange(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        space = stack_bytes(space_bytes)
        panels, steps = (args.keys + SIDE - 1) // SIDE, (args.width + SIDE - 1) // SIDE
        wide = (args.value_width + SIDE - 1) // SIDE
        pitch = panels * value_parts * PART_BYTES
        items = item_count(args, args.keys, SIDE)
        item = first_item(pointer, items)
        while item < items:
            image, head, first, count = place_of(args, item, args.keys, SIDE)
            panel = args.key_panels + item * steps * score_parts * PART_BYTES
            _arrange_keys(args, image, head, first, count, panel, score_parts)
            step = args.value_panels + (image * args.heads + head) * wide * pitch
            step += first // SIDE * value_parts * PART_BYTES
            _arrange_values(args, image, head, first, count, step, pitch, space, value_parts)
            item = next_item(address_of(pointer))

    return amx_arrange, MATRIX_ATTENTION_ARGS


@njit(inline="always", error_model="numpy")
def _take_queries(args: Any, place: Any, panels: Any, pitch: Any, space: Any, parts: Any) -> None:
    """Cut an item's queries, times the exponent, into panels ``pitch`` bytes apart."""
    image, head, first, count = place
    q = args.q + 4 * (image * args.q_image + head * args.q_head + first * args.q_row)
    factor = splat(args.exponent, TILE)
    for i in range(0, (count + SIDE - 1) // SIDE * SIDE, TILE):
        panel = panels + i // SIDE * pitch + i // TILE % 2 * TILE_BYTES
        for c in range(0, args.width, SIDE):
            line = q + 4 * (i * args.q_row + c)
            _cut_rows(line, args.q_row, count - i, args.width - c, factor, space, parts)
            _transpose_parts(space, panel + c // SIDE * parts * PART_BYTES, parts)


@njit(inline="always", error_model="numpy")
def _mask_keys(count: Any, block: Any) -> None:
    """Write what is added to the scores of a panel of ``count`` keys: -inf past them."""
    for i in range(SIDE):
        line = splat(float32(0.0) if i < count else float32(-float("inf")), TILE)
        store(block + ROW_BYTES * i, line)
        store(block + ROW_BYTES * i + _LANES_BYTES, line)


@njit(inline="always", error_model="numpy")
def _raise_tops(found: Any, tops: Any, sums: Any, product: Any, wide: Any) -> None:
    """Raise m of 32 queries where the scores found are too far above it; scale the sums and products."""
    for at in range(0, ROW_BYTES, _LANES_BYTES):
        top = load_floats(tops + at, TILE)
        # Other lanes stay as they are, so that no query depends on its neighbours.
        new = raised(load_floats(found + at, TILE), top)
        if largest(new - top) > float32(0.0):
            factor = power_of_two(top - new)
            store(tops + at, new)
            store(sums + at, load_floats(sums + at, TILE) * factor)
            for row in range(wide * SIDE):
                line = product + ROW_BYTES * row + at
                store(line, load_floats(line, TILE) * factor)


@njit(inline="always", error_model="numpy")
def _write_outputs(args: Any, place: Any, products: Any, wide: Any, sums: Any, space: Any) -> None:
    """Write an item's products over their sums to the output, queries as rows."""
    image, head, first, count = place
    out = args.out + 4 * (image * args.out_image + head * args.out_head + first * args.out_row)
    for i in range(0, count, TILE):
        block, at = i // SIDE, i // TILE % 2 * _LANES_BYTES
        factor = splat(float32(1.0), TILE) / load_floats(sums + ROW_BYTES * block + at, TILE)
        for c in range(0, args.value_width, TILE):
            lines = products + block * wide * BLOCK_BYTES + ROW_BYTES * c + at
            for row in range(TILE):
                store(lines + ROW_BYTES * row, load_floats(lines + ROW_BYTES * row, TILE) * factor)
            transpose_tile(lines, ROW_BYTES, TILE, TILE, space, _LANES_BYTES, TILE)
            for row in range(min(TILE, count - i)):
                line = load_floats(space + _LANES_BYTES * row, TILE)
                store_first(out + 4 * ((i + row) * args.out_row + c), line, args.value_width - c)


def make_amx_attend(score_parts: int, value_parts: int) -> Source:
    """Make the attention kernel for queries and keys, and weights and values, of so many parts."""
    key_step, value_step = score_parts * PART_BYTES, value_parts * PART_BYTES
    space_bytes, score_bytes, weight_bytes = key_step, PANELS * BLOCK_BYTES, PANELS * value_step
    lane_bytes = MOST_BLOCKS * ROW_BYTES

    def amx_attend(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        space, mask, found = stack_bytes(space_bytes), stack_bytes(BLOCK_BYTES), stack_bytes(ROW_BYTES)
        scores, weights = stack_bytes(score_bytes), stack_bytes(weight_bytes)
        tops, sums = stack_bytes(lane_bytes), stack_bytes(lane_bytes)
        panels, steps = (args.keys + SIDE - 1) // SIDE, (args.width + SIDE - 1) // SIDE
        wide, rows = (args.value_width + SIDE - 1) // SIDE, args.blocks * SIDE
        thread = next_item(address_of(pointer) + ARRIVALS) * args.blocks
        queries = args.query_panels + thread * steps * key_step
        products = args.products + thread * wide * BLOCK_BYTES
        _mask_keys(args.keys - (panels - 1) * SIDE, mask)
        items = item_count(args, args.queries, rows)
        item = first_item(pointer, items)
        if item < items:
            open_tiles()
        while item < items:
            place = place_of(args, item, args.queries, rows)
            pair = place[0] * args.heads + place[1]
            keys = args.key_panels + pair * panels * steps * key_step
            values = args.value_panels + pair * wide * panels * value_step
            _take_queries(args, place, queries, steps * key_step, space, score_parts)
            for panel in range(0, panels, PANELS):
                here = min(PANELS, panels - panel)
                for block in range((place[3] + SIDE - 1) // SIDE):
                    for p in range(here):
                        start = mask if (panel + p + 1) * SIDE > args.keys else 0
                        multiply_floats(
                            keys + (panel + p) * steps * key_step,
                            queries + block * steps * key_step,
                            steps,
                            start,
                            scores + p * BLOCK_BYTES,
                            score_parts,
                        )
                    top, total = tops + block * ROW_BYTES, sums + block * ROW_BYTES
                    product = products + block * wide * BLOCK_BYTES
                    if panel == 0:
                        column_maxima(scores, here * SIDE, top)
                        store(total, splat(float32(0.0), SIDE))
                    else:
                        column_maxima(scores, here * SIDE, found)
                        _raise_tops(found, top, total, product, wide)
                    weigh(scores, here, top, total, weights, value_parts)
                    for w in range(wide):
                        into = product + w * BLOCK_BYTES
                        multiply_floats(
                            values + (w * panels + panel) * value_step,
                            weights,
                            here,
                            into if panel else 0,
                            into,
                            value_parts,
                        )
            _write_outputs(args, place, products, wide, sums, space)
            item = next_item(address_of(pointer))
            if item >= items:
                close_tiles()

    return amx_attend, MATRIX_ATTENTION_ARGS
