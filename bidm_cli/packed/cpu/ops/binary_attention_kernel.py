"""Fused attention with binary scores, without a matrix of all scores.

    s_ij = f_i m_j (d - 2 popcount(q_i xor k_j)),   y_i = sum over j of softmax_j(s_ij) v_j

with words of signs q_i and k_j, m_j the mean of |k_j|, and f_i the mean of |q_i| times the head's factor. As
in :mod:`bidm_cli.packed.cpu.ops.attention_kernel`, ``arrange_binary`` brings keys and values into panels as wide
as a tile, and ``attend_binary`` takes a few queries at a time. Both read a BINARY_ATTENTION_JOB.

Channels that fill up a last word are +1 in queries and keys alike, and so never differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, float32, int32, njit

from bidm_cli.packed.cpu.codegen.matmul import multiply_tile
from bidm_cli.packed.cpu.codegen.popcount import count_tile
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    bits_at_least,
    joined,
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
from bidm_cli.packed.cpu.codegen.vector_math import exp2, larger, largest
from bidm_cli.packed.cpu.ops.attention_kernel import arrange_values, place_of, point_at, write_tile
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, ATTENTION_FIELDS

BINARY_ATTENTION_JOB = np.dtype(
    [
        *ATTENTION_FIELDS,
        ("words", np.int64),  # of a query or key
        ("key_words", np.int64),  # int32 [images * heads, panels of keys, words, keys of a panel]
        ("key_means", np.int64),  # float32 [images * heads, padded keys]
        ("query_words", np.int64),  # int32 [threads, tile rows, words]
        ("values", np.int64),  # float32 [images * heads, panels of values, keys, columns of a panel]
        ("scores", np.int64),  # float32 [threads, tile rows, score pitch]
        ("score_pitch", np.int64),
        ("padded_keys", np.int64),
        ("padded_values", np.int64),
        ("factors", np.int64),  # float32 [heads]: |gamma| scale log2(e)
    ],
    align=True,
)


@njit(inline="always", error_model="numpy")
def _pack_row(source: Any, width: Any, words: Any, step: Any) -> Any:
    """The signs of ``width`` floats as words, ``step`` bytes apart; gives their mean magnitude."""
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


def arrange_kernel(lanes: int, tile_vectors: int) -> Callable[[Any], None]:
    """Signs and means of keys, and values, into their places."""
    wide = lanes * tile_vectors

    def arrange_binary(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        found_work = False
        while True:
            image, head, first, count, there = place_of(job, next_item(address_of(jobs)), job.keys, lanes)
            if not there:
                break
            found_work = True
            pair = image * job.heads + head
            k = job.k + 4 * (image * job.k_image + head * job.k_head + first * job.k_row)
            panel = pair * job.padded_keys // wide + first // wide
            words = job.key_words + 4 * (panel * job.words * wide + first % wide)
            means = job.key_means + 4 * (pair * job.padded_keys + first)
            for j in range(count):
                mean = _pack_row(k + 4 * j * job.k_row, job.width, words + 4 * j, 4 * wide)
                store_float(means + 4 * j, mean)
            v = job.v + 4 * (image * job.v_image + head * job.v_head + first * job.v_row)
            values = job.values + 4 * (pair * job.keys * job.padded_values + first * wide)
            arrange_values(job, v, count, values, lanes, wide)
        joined(jobs, found_work)

    return arrange_binary


@njit(inline="always", error_model="numpy")
def _score(
    job: Any, counts: Any, means: Any, scores: Any, pitch: Any, count: Any, lanes: Any, wide: Any
) -> None:
    """Scores of a tile but for the queries' factors: m_j (d - 2 n)."""
    width = splat(int32(job.width), lanes)
    for w in range(0, wide, lanes):
        mean = load_floats(means + 4 * w, lanes)
        for i in range(count):
            n = load_ints(counts + 4 * (i * wide + w), lanes)
            store(scores + i * pitch + 4 * w, to_floats(width - n - n) * mean)


@njit(inline="always", error_model="numpy")
def _exponentials(job: Any, scores: Any, pitch: Any, count: Any, factors: Any, lanes: Any) -> None:
    """Turn rows of scores into e^(f (s - max)), and their factors f into 1 / the sum."""
    surplus = job.padded_keys - job.keys
    for i in range(count):
        line = scores + i * pitch
        for j in range(job.keys, job.padded_keys):
            store_float(line + 4 * j, float32(-3e38))
        top = load_floats(line, lanes)
        for j in range(lanes, job.padded_keys, lanes):
            top = larger(top, load_floats(line + 4 * j, lanes))
        factor = load_float(factors + 4 * i)
        exponent, offset = splat(factor, lanes), splat(largest(top) * factor, lanes)
        sums = splat(float32(0.0), lanes)
        for j in range(0, job.padded_keys, lanes):
            p = exp2(load_floats(line + 4 * j, lanes) * exponent - offset)
            store(line + 4 * j, p)
            sums = sums + p
        whole = total(sums)
        if surplus:
            # Nothing, but where the factor is 0: there every term is 1.
            whole -= float32(surplus) * load_float(line + 4 * job.keys)
        store_float(factors + 4 * i, float32(1.0) / whole)


def attend_kernel(method: str, lanes: int, tile_rows: int, tile_vectors: int) -> Callable[[Any], None]:
    """The attention itself, for one form of :func:`count_tile` and :func:`multiply_tile`."""
    wide = lanes * tile_vectors
    pointer_space, row_space, tile_space = 8 * tile_rows, 4 * tile_rows, 4 * tile_rows * wide
    line = 4 * wide

    def attend_binary(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        rows, factors = stack_bytes(pointer_space), stack_bytes(row_space)
        tile = stack_bytes(tile_space)
        pitch = 4 * job.score_pitch
        place = next_item(address_of(jobs) + ARRIVALS) * tile_rows
        scores, queries = job.scores + place * pitch, job.query_words + 4 * place * job.words
        found_work = False
        while True:
            item = next_item(address_of(jobs))
            image, head, first, count, there = place_of(job, item, job.queries, tile_rows)
            if not there:
                break
            found_work = True
            pair = image * job.heads + head
            q = job.q + 4 * (image * job.q_image + head * job.q_head + first * job.q_row)
            for i in range(count):
                mean = _pack_row(q + 4 * i * job.q_row, job.width, queries + 4 * i * job.words, 4)
                store_float(factors + 4 * i, mean * load_float(job.factors + 4 * head))
            point_at(rows, queries, 4 * job.words, count, tile_rows)
            for j in range(0, job.padded_keys, wide):
                panel = job.key_words + 4 * (pair * job.padded_keys + j) * job.words
                count_tile(rows, panel, 1, job.words, 0, tile, method, lanes, tile_rows, tile_vectors)
                means = job.key_means + 4 * (pair * job.padded_keys + j)
                _score(job, tile, means, scores + 4 * j, pitch, count, lanes, wide)

            _exponentials(job, scores, pitch, count, factors, wide)
            point_at(rows, scores, pitch, count, tile_rows)
            values = job.values + 4 * pair * job.keys * job.padded_values
            out = job.out + 4 * (image * job.out_image + head * job.out_head + first * job.out_row)
            for c in range(0, job.value_width, wide):
                panel = values + 4 * c * job.keys
                multiply_tile(rows, panel, line, job.keys, tile, line, lanes, tile_rows, tile_vectors)
                write_tile(tile, line, factors, out + 4 * c, job.out_row, count, job.value_width - c, lanes)
        joined(jobs, found_work)

    return attend_binary
