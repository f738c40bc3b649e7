"""Attention kernels with float scores, softmax(q k^T scale) v, without a matrix of all scores.

``arrange`` brings the keys of each head, transposed, and its values into panels: as many columns as a tile
has, row after row, so that products read memory in a line. ``attend`` takes a few queries at a time: their
scores against all keys stay in a cache, become e^(s - max), and are multiplied by the values; the sum divides
last. Where a head's keys and values are larger than a cache, several tiles of queries share each panel.
:mod:`bidm_cli.packed.cpu.ops.binary_attention_kernel` has other scores and shares the rest.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.matmul import multiply_tile
from bidm_cli.packed.cpu.codegen.transpose import transpose_tile
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    arrive,
    first_item,
    load_first_floats,
    load_float,
    load_floats,
    next_item,
    splat,
    stack_bytes,
    store,
    store_first,
    store_float,
    store_long,
    total,
)
from bidm_cli.packed.cpu.codegen.vector_math import exp2, larger, largest
from bidm_cli.packed.cpu.ops.structs import ATTENTION_ARGS, MOST_TILES
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, Source


@njit(inline="always", error_model="numpy")
def item_count(args: Any, size: Any, step: Any) -> Any:
    """Items of all heads, where an item is ``step`` of ``size`` rows."""
    return args.images * args.heads * ((size + step - 1) // step)


@njit(inline="always", error_model="numpy")
def place_of(args: Any, item: Any, size: Any, step: Any) -> Any:
    """(image, head, first row, rows) of an item that is ``step`` of ``size`` rows."""
    blocks = (size + step - 1) // step
    pair = item // blocks
    first = (item - pair * blocks) * step
    image = pair // args.heads
    return image, pair - image * args.heads, first, min(step, size - first)


@njit(inline="always", error_model="numpy")
def arrange_values(args: Any, image: Any, head: Any, first: Any, count: Any, lanes: Any, wide: Any) -> None:
    """Copy ``count`` values of a head to rows of all panels."""
    v = args.v + 4 * (image * args.v_image + head * args.v_head + first * args.v_row)
    values = args.values + 4 * ((image * args.heads + head) * args.keys * args.padded_values + first * wide)
    for j in range(count):
        for c in range(0, args.value_width, lanes):
            line = load_first_floats(v + 4 * (j * args.v_row + c), min(lanes, args.value_width - c), lanes)
            panel = c // wide
            store(values + 4 * ((panel * args.keys + j) * wide + c - panel * wide), line)


def make_arrange(lanes: int, tile_vectors: int) -> Source:
    """Make the kernel that brings keys into ``columns`` and values into ``values``."""
    wide = lanes * tile_vectors

    def arrange(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        items = item_count(args, args.keys, lanes)
        item = first_item(pointer, items)
        while item < items:
            image, head, first, count = place_of(args, item, args.keys, lanes)
            k = args.k + 4 * (image * args.k_image + head * args.k_head + first * args.k_row)
            panel = (image * args.heads + head) * args.padded_keys // wide + first // wide
            columns = args.columns + 4 * (panel * args.padded_width * wide + first % wide)
            for c in range(0, args.width, lanes):
                left, into = min(lanes, args.width - c), columns + 4 * c * wide
                transpose_tile(k + 4 * c, 4 * args.k_row, count, left, into, 4 * wide, lanes)
            arrange_values(args, image, head, first, count, lanes, wide)
            item = next_item(pointer, items)

    return arrange, ATTENTION_ARGS


@njit(inline="always", error_model="numpy")
def point_at(rows: Any, start: Any, pitch: Any, count: Any, tile_rows: Any) -> None:
    """Store the addresses of a tile's rows; those beyond ``count`` are the last one again."""
    for i in range(tile_rows):
        store_long(rows + 8 * i, start + min(i, count - 1) * pitch)


@njit(inline="always", error_model="numpy")
def _exponentials(args: Any, scores: Any, pitch: Any, count: Any, factors: Any, lanes: Any) -> None:
    """Turn rows of scores into e^(f (s - max)), and their factors f (times log2 e) into 1 / the sum."""
    surplus = args.padded_keys - args.keys
    for i in range(count):
        line = scores + i * pitch
        for j in range(args.keys, args.padded_keys):
            store_float(line + 4 * j, float32(-3e38))
        top = load_floats(line, lanes)
        for j in range(lanes, args.padded_keys, lanes):
            top = larger(top, load_floats(line + 4 * j, lanes))
        factor = load_float(factors + 4 * i)
        exponent, offset = splat(factor, lanes), splat(largest(top) * factor, lanes)
        sums = splat(float32(0.0), lanes)
        for j in range(0, args.padded_keys, lanes):
            p = exp2(load_floats(line + 4 * j, lanes) * exponent - offset)
            store(line + 4 * j, p)
            sums = sums + p
        whole = total(sums)
        if surplus:
            # Nothing, but where the factor is 0: there every term is 1.
            whole -= float32(surplus) * load_float(line + 4 * args.keys)
        store_float(factors + 4 * i, float32(1.0) / whole)


@njit(inline="always", error_model="numpy")
def _write_tile(
    tile: Any, pitch: Any, factors: Any, out: Any, row: Any, count: Any, left: Any, lanes: Any
) -> None:
    """Store rows of a product times their factors, the first ``left`` columns of them."""
    for i in range(count):
        factor = splat(load_float(factors + 4 * i), lanes)
        for w in range(0, min(left, pitch // 4), lanes):
            result = load_floats(tile + i * pitch + 4 * w, lanes) * factor
            if left - w >= lanes:
                store(out + 4 * (i * row + w), result)
            else:
                store_first(out + 4 * (i * row + w), result, left - w)


@njit(inline="always", error_model="numpy")
def weigh_values(
    args: Any,
    place: Any,
    scores: Any,
    factors: Any,
    rows: Any,
    tile: Any,
    lanes: Any,
    tile_rows: Any,
    tile_vectors: Any,
    wide: Any,
) -> None:
    """Write an item's outputs from its scores and the scores' factors; rows, tile: scratch memory."""
    image, head, first, count = place
    pitch, line = 4 * args.score_pitch, 4 * wide
    _exponentials(args, scores, pitch, count, factors, wide)
    values = args.values + 4 * (image * args.heads + head) * args.keys * args.padded_values
    out = args.out + 4 * (image * args.out_image + head * args.out_head + first * args.out_row)
    for c in range(0, args.value_width, wide):
        panel = values + 4 * c * args.keys
        for i in range(0, count, tile_rows):
            here = min(tile_rows, count - i)
            point_at(rows, scores + i * pitch, pitch, here, tile_rows)
            multiply_tile(rows, panel, line, args.keys, tile, line, lanes, tile_rows, tile_vectors)
            into = out + 4 * (i * args.out_row + c)
            _write_tile(tile, line, factors + 4 * i, into, args.out_row, here, args.value_width - c, lanes)


def make_attend(lanes: int, tile_rows: int, tile_vectors: int) -> Source:
    """Make the attention kernel for one form of :func:`multiply_tile`."""
    wide = lanes * tile_vectors
    pointer_space, row_space, tile_space = 8 * tile_rows, 4 * MOST_TILES * tile_rows, 4 * tile_rows * wide

    def attend(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        rows, factors = stack_bytes(pointer_space), stack_bytes(row_space)
        product = stack_bytes(tile_space)
        pitch, step = 4 * args.score_pitch, args.tiles * tile_rows
        scores = args.scores + arrive(address_of(pointer) + ARRIVALS) * step * pitch
        items = item_count(args, args.queries, step)
        item = first_item(pointer, items)
        while item < items:
            image, head, first, count = place_of(args, item, args.queries, step)
            q = args.q + 4 * (image * args.q_image + head * args.q_head + first * args.q_row)
            columns = args.columns + 4 * (image * args.heads + head) * args.padded_width * args.padded_keys
            for j in range(0, args.padded_keys, wide):
                panel = columns + 4 * j * args.padded_width
                for i in range(0, count, tile_rows):
                    point_at(rows, q + 4 * i * args.q_row, 4 * args.q_row, count - i, tile_rows)
                    into = scores + i * pitch + 4 * j
                    multiply_tile(
                        rows, panel, 4 * wide, args.width, into, pitch, lanes, tile_rows, tile_vectors
                    )
            for i in range(count):
                store_float(factors + 4 * i, args.exponent)
            place = image, head, first, count
            weigh_values(args, place, scores, factors, rows, product, lanes, tile_rows, tile_vectors, wide)
            item = next_item(pointer, items)

    return attend, ATTENTION_ARGS
