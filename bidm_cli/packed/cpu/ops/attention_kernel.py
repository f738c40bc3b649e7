"""Fused float attention, softmax(q k^T scale) v, without a matrix of all scores.

Two kernels. ``arrange`` brings the keys of each head, transposed, and its values into panels: as many columns
as a tile has, row after row, so that products read memory in a line. ``attend`` takes a few queries at a
time: their scores against all keys stay in a cache, become e^(s - max), and are multiplied by the values; the
sum divides last. Both read an ATTENTION_JOB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.matmul import multiply_tile
from bidm_cli.packed.cpu.codegen.transpose import transpose_tile
from bidm_cli.packed.cpu.codegen.vector import (
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
from bidm_cli.packed.cpu.codegen.vector_math import exp2, larger, largest
from bidm_cli.packed.cpu.runtime.args import ARRIVALS


@njit(inline="always", error_model="numpy")
def place_of(job: Any, item: Any, size: Any, step: Any) -> Any:
    """(image, head, first row, rows, whether it exists) of an item that is ``step`` of ``size`` rows."""
    blocks = (size + step - 1) // step
    pair = item // blocks
    first = (item - pair * blocks) * step
    image = pair // job.heads
    return image, pair - image * job.heads, first, min(step, size - first), image < job.images


@njit(inline="always", error_model="numpy")
def _arrange_keys(k: Any, pitch: Any, count: Any, width: Any, columns: Any, lanes: Any, wide: Any) -> None:
    """``count`` keys of ``width`` floats become as many columns of a panel."""
    for c in range(0, width, lanes):
        there = min(lanes, width - c)
        transpose_tile(k + 4 * c, pitch, count, there, columns + 4 * c * wide, 4 * wide, lanes)


@njit(inline="always", error_model="numpy")
def arrange_values(job: Any, v: Any, count: Any, values: Any, lanes: Any, wide: Any) -> None:
    """``count`` values become rows of all panels."""
    for j in range(count):
        for c in range(0, job.value_width, lanes):
            line = load_first_floats(v + 4 * (j * job.v_row + c), min(lanes, job.value_width - c), lanes)
            panel = c // wide
            store(values + 4 * ((panel * job.keys + j) * wide + c - panel * wide), line)


def arrange_kernel(lanes: int, tile_vectors: int) -> Callable[[Any], None]:
    """Keys into ``columns``, values into ``values``, for one form of :func:`multiply_tile`."""
    wide = lanes * tile_vectors

    def arrange(jobs: Any) -> None:
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
            columns = job.columns + 4 * (panel * job.padded_width * wide + first % wide)
            _arrange_keys(k, 4 * job.k_row, count, job.width, columns, lanes, wide)
            v = job.v + 4 * (image * job.v_image + head * job.v_head + first * job.v_row)
            values = job.values + 4 * (pair * job.keys * job.padded_values + first * wide)
            arrange_values(job, v, count, values, lanes, wide)
        joined(jobs, found_work)

    return arrange


@njit(inline="always", error_model="numpy")
def point_at(rows: Any, start: Any, pitch: Any, count: Any, tile_rows: Any) -> None:
    """The addresses of a tile's rows; those beyond ``count`` are the last one again."""
    for i in range(tile_rows):
        store_long(rows + 8 * i, start + min(i, count - 1) * pitch)


@njit(inline="always", error_model="numpy")
def _exponentials(job: Any, scores: Any, pitch: Any, count: Any, factors: Any, lanes: Any) -> None:
    """Turn rows of scores into e^(scale (s - max)), and put 1 / their sum into ``factors``."""
    for i in range(count):
        line = scores + i * pitch
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


@njit(inline="always", error_model="numpy")
def write_tile(
    tile: Any, pitch: Any, factors: Any, out: Any, row: Any, count: Any, left: Any, lanes: Any
) -> None:
    """Rows of a product times their factors, the first ``left`` columns of them."""
    for i in range(count):
        factor = splat(load_float(factors + 4 * i), lanes)
        for w in range(0, min(left, pitch // 4), lanes):
            result = load_floats(tile + i * pitch + 4 * w, lanes) * factor
            if left - w >= lanes:
                store(out + 4 * (i * row + w), result)
            else:
                store_first(out + 4 * (i * row + w), result, left - w)


def attend_kernel(lanes: int, tile_rows: int, tile_vectors: int) -> Callable[[Any], None]:
    """The attention itself, for one form of :func:`multiply_tile`."""
    wide = lanes * tile_vectors
    pointer_space, row_space, tile_space = 8 * tile_rows, 4 * tile_rows, 4 * tile_rows * wide
    line = 4 * wide

    def attend(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        rows, factors = stack_bytes(pointer_space), stack_bytes(row_space)
        tile = stack_bytes(tile_space)
        pitch = 4 * job.score_pitch
        scores = job.scores + next_item(address_of(jobs) + ARRIVALS) * tile_rows * pitch
        found_work = False
        while True:
            item = next_item(address_of(jobs))
            image, head, first, count, there = place_of(job, item, job.queries, tile_rows)
            if not there:
                break
            found_work = True
            pair = image * job.heads + head
            q = job.q + 4 * (image * job.q_image + head * job.q_head + first * job.q_row)
            point_at(rows, q, 4 * job.q_row, count, tile_rows)
            columns = job.columns + 4 * pair * job.padded_width * job.padded_keys
            for j in range(0, job.padded_keys, wide):
                panel, into = columns + 4 * j * job.padded_width, scores + 4 * j
                multiply_tile(rows, panel, line, job.width, into, pitch, lanes, tile_rows, tile_vectors)

            _exponentials(job, scores, pitch, count, factors, wide)
            point_at(rows, scores, pitch, count, tile_rows)
            values = job.values + 4 * pair * job.keys * job.padded_values
            out = job.out + 4 * (image * job.out_image + head * job.out_head + first * job.out_row)
            for c in range(0, job.value_width, wide):
                panel = values + 4 * c * job.keys
                multiply_tile(rows, panel, line, job.keys, tile, line, lanes, tile_rows, tile_vectors)
                write_tile(tile, line, factors, out + 4 * c, job.out_row, count, job.value_width - c, lanes)
        joined(jobs, found_work)

    return attend
