"""Attention kernels with binary scores, without a matrix of all scores.

    s_ij = f_i m_j (d - 2 popcount(q_i xor k_j)),   y_i = sum over j of softmax_j(s_ij) v_j

with words of signs q_i and k_j, m_j the mean of |k_j|, and f_i the mean of |q_i| times the head's factor.
``arrange_binary`` and ``attend_binary`` work as the kernels of
:mod:`bidm_cli.packed.cpu.ops.attention_kernel`.

Channels that fill up a last word are +1 in queries and keys alike, and so never differ.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, int32, njit

from bidm_cli.packed.cpu.codegen.popcount import count_tile
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    arrive,
    bits_at_least,
    first_item,
    load_first_floats,
    load_float,
    load_floats,
    load_ints,
    magnitudes,
    next_item,
    splat,
    stack_bytes,
    store,
    store_float,
    store_int,
    to_floats,
    total,
)
from bidm_cli.packed.cpu.ops.attention_kernel import (
    arrange_values,
    item_count,
    place_of,
    point_at,
    weigh_values,
)
from bidm_cli.packed.cpu.ops.structs import BINARY_ATTENTION_ARGS
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, Source


@njit(inline="always", error_model="numpy")
def _pack_row(source: Any, width: Any, words: Any, step: Any) -> Any:
    """Store the signs of ``width`` floats as words, ``step`` bytes apart; returns their mean magnitude."""
    whole, rest = width // 32, width % 32
    zero = splat(float32(0.0), 32)
    magnitude = zero
    for w in range(whole):
        v = load_floats(source + 128 * w, 32)
        magnitude = magnitude + magnitudes(v)
        store_int(words + w * step, bits_at_least(v, zero))
    if rest:
        v = load_first_floats(source + 128 * whole, rest, 32)
        magnitude = magnitude + magnitudes(v)
        store_int(words + whole * step, bits_at_least(v, zero))
    return total(magnitude) / float32(width)


def make_arrange_binary(lanes: int, tile_vectors: int) -> Source:
    """Make the kernel that brings signs and means of keys, and values, into their places."""
    wide = lanes * tile_vectors

    def arrange_binary(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        items = item_count(args, args.keys, lanes)
        item = first_item(pointer, items)
        while item < items:
            image, head, first, count = place_of(args, item, args.keys, lanes)
            pair = image * args.heads + head
            k = args.k + 4 * (image * args.k_image + head * args.k_head + first * args.k_row)
            panel = pair * args.padded_keys // wide + first // wide
            words = args.key_words + 4 * (panel * args.words * wide + first % wide)
            means = args.key_means + 4 * (pair * args.padded_keys + first)
            for j in range(count):
                mean = _pack_row(k + 4 * j * args.k_row, args.width, words + 4 * j, 4 * wide)
                store_float(means + 4 * j, mean)
            arrange_values(args, image, head, first, count, lanes, wide)
            item = next_item(pointer, items)

    return arrange_binary, BINARY_ATTENTION_ARGS


@njit(inline="always", error_model="numpy")
def _score(
    args: Any, counts: Any, means: Any, scores: Any, pitch: Any, count: Any, lanes: Any, wide: Any
) -> None:
    """Scores of a tile but for the queries' factors: m_j (d - 2 n)."""
    width = splat(int32(args.width), lanes)
    for w in range(0, wide, lanes):
        mean = load_floats(means + 4 * w, lanes)
        for i in range(count):
            n = load_ints(counts + 4 * (i * wide + w), lanes)
            store(scores + i * pitch + 4 * w, to_floats(width - n - n) * mean)


def make_attend_binary(method: str, lanes: int, tile_rows: int, tile_vectors: int) -> Source:
    """Make the attention kernel for one form of :func:`count_tile` and :func:`multiply_tile`."""
    wide = lanes * tile_vectors
    pointer_space, row_space, tile_space = 8 * tile_rows, 4 * tile_rows, 4 * tile_rows * wide

    def attend_binary(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        rows, factors = stack_bytes(pointer_space), stack_bytes(row_space)
        product = stack_bytes(tile_space)
        pitch = 4 * args.score_pitch
        row = arrive(address_of(pointer) + ARRIVALS) * tile_rows
        scores, queries = args.scores + row * pitch, args.query_words + 4 * row * args.words
        items = item_count(args, args.queries, tile_rows)
        item = first_item(pointer, items)
        while item < items:
            image, head, first, count = place_of(args, item, args.queries, tile_rows)
            pair = image * args.heads + head
            q = args.q + 4 * (image * args.q_image + head * args.q_head + first * args.q_row)
            for i in range(count):
                mean = _pack_row(q + 4 * i * args.q_row, args.width, queries + 4 * i * args.words, 4)
                store_float(factors + 4 * i, mean * load_float(args.head_factors + 4 * head))
            point_at(rows, queries, 4 * args.words, count, tile_rows)
            for j in range(0, args.padded_keys, wide):
                panel = args.key_words + 4 * (pair * args.padded_keys + j) * args.words
                count_tile(rows, panel, 1, args.words, 0, product, method, lanes, tile_rows, tile_vectors)
                means = args.key_means + 4 * (pair * args.padded_keys + j)
                _score(args, product, means, scores + 4 * j, pitch, count, lanes, wide)
            place = image, head, first, count
            weigh_values(args, place, scores, factors, rows, product, lanes, tile_rows, tile_vectors, wide)
            item = next_item(pointer, items)

    return attend_binary, BINARY_ATTENTION_ARGS
