"""Fused float attention, softmax(q k^T scale) v, without a matrix of all scores.

Two kernels. ``arrange`` brings the keys of each head into columns and its values into rows of whole vectors;
``attend`` takes a few queries at a time: their scores against all keys stay in a cache, become e^(s - max),
and are multiplied by the values; the sum divides last. Both read an ATTENTION_JOB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.multiply import multiply_tile
from bidm_cli.packed.cpu.transpose import transpose_tile
from bidm_cli.packed.cpu.vector import (
    address_of,
    joined,
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
from bidm_cli.packed.cpu.vector_math import exp2, larger, largest


def arrange_kernel(lanes: int) -> Callable[[Any], None]:
    """Keys [keys, width] to [padded width, padded keys]; values to [keys, padded value width]."""

    def arrange(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        blocks = (job.keys + lanes - 1) // lanes
        found_work = False
        while True:
            item = next_item(address_of(jobs))
            if item >= job.images * job.heads * blocks:
                break
            found_work = True
            pair = item // blocks
            image = pair // job.heads
            head = pair - image * job.heads
            first = (item - pair * blocks) * lanes
            count = min(lanes, job.keys - first)
            k = job.k + 4 * (image * job.k_image + head * job.k_head + first * job.k_row)
            columns = job.columns + 4 * (pair * job.padded_width * job.padded_keys + first)
            for c in range(0, job.width, lanes):
                there = min(lanes, job.width - c)
                target = columns + 4 * c * job.padded_keys
                transpose_tile(k + 4 * c, 4 * job.k_row, count, there, target, 4 * job.padded_keys, lanes)
            v = job.v + 4 * (image * job.v_image + head * job.v_head + first * job.v_row)
            values = job.values + 4 * (pair * job.keys + first) * job.padded_values
            for j in range(count):
                for c in range(0, job.value_width, lanes):
                    source = v + 4 * (j * job.v_row + c)
                    line = load_first_floats(source, min(lanes, job.value_width - c), lanes)
                    store(values + 4 * (j * job.padded_values + c), line)
        joined(jobs, found_work)

    return arrange


@njit(inline="always", error_model="numpy")
def _exponentials(job: Any, scores: Any, count: Any, factors: Any, lanes: Any) -> None:
    """Turn rows of scores into e^(scale (s - max)), and put 1 / their sum into ``factors``."""
    for i in range(count):
        line = scores + 4 * i * job.padded_keys
        for j in range(job.keys, job.padded_keys):
            store_float(line + 4 * j, float32(-3e38))
        top = load_floats(line, lanes)
        for j in range(lanes, job.padded_keys, lanes):
            top = larger(top, load_floats(line + 4 * j, lanes))
        offset = splat(largest(top) * job.exponent, lanes)
        exponent = splat(job.exponent, lanes)
        sums = splat(float32(0.0), lanes)
        for j in range(0, job.padded_keys, lanes):
            p = exp2(load_floats(line + 4 * j, lanes) * exponent - offset)
            store(line + 4 * j, p)
            sums = sums + p
        store_float(factors + 4 * i, float32(1.0) / total(sums))


def attend_kernel(lanes: int, tile_rows: int, tile_vectors: int) -> Callable[[Any], None]:
    """The attention itself, for one form of :func:`multiply_tile`."""
    wide = lanes * tile_vectors
    pointer_space, row_space, tile_space = 8 * tile_rows, 4 * tile_rows, 4 * tile_rows * wide

    def attend(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        rows, factors = stack_bytes(pointer_space), stack_bytes(row_space)
        tile = stack_bytes(tile_space)
        pitch = 4 * job.padded_keys
        scores = job.scores + next_item(address_of(jobs) + 16) * tile_rows * pitch
        blocks = (job.queries + tile_rows - 1) // tile_rows
        found_work = False
        while True:
            item = next_item(address_of(jobs))
            if item >= job.images * job.heads * blocks:
                break
            found_work = True
            pair = item // blocks
            image = pair // job.heads
            head = pair - image * job.heads
            first = (item - pair * blocks) * tile_rows
            count = min(tile_rows, job.queries - first)
            q = job.q + 4 * (image * job.q_image + head * job.q_head)
            for i in range(tile_rows):
                store_long(rows + 8 * i, q + 4 * (first + min(i, count - 1)) * job.q_row)
            columns = job.columns + 4 * pair * job.padded_width * job.padded_keys
            for j in range(0, job.padded_keys, wide):
                multiply_tile(
                    rows,
                    columns + 4 * j,
                    pitch,
                    job.width,
                    scores + 4 * j,
                    pitch,
                    lanes,
                    tile_rows,
                    tile_vectors,
                )

            _exponentials(job, scores, count, factors, lanes)
            for i in range(tile_rows):
                store_long(rows + 8 * i, scores + min(i, count - 1) * pitch)

            values = job.values + 4 * pair * job.keys * job.padded_values
            for c in range(0, job.padded_values, wide):
                multiply_tile(
                    rows,
                    values + 4 * c,
                    4 * job.padded_values,
                    job.keys,
                    tile,
                    4 * wide,
                    lanes,
                    tile_rows,
                    tile_vectors,
                )
                for i in range(count):
                    at = image * job.out_image + head * job.out_head + (first + i) * job.out_row
                    factor = splat(load_float(factors + 4 * i), lanes)
                    for w in range(0, wide, lanes):
                        result = load_floats(tile + 4 * (i * wide + w), lanes) * factor
                        left = job.value_width - c - w
                        target = job.out + 4 * (at + c + w)
                        if left >= lanes:
                            store(target, result)
                        elif left > 0:
                            store_first(target, result, left)
        joined(jobs, found_work)

    return attend
