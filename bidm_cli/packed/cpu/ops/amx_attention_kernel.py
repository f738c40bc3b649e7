"""Attention kernels for machines with a matrix unit: softmax(q k^T scale) v by products of bfloat16 parts.

    s_ij = scale log2(e) q_i k_j,   y_i = sum over j of 2^(s_ij - m_i) v_j / sum over j of 2^(s_ij - m_i)

``amx_arrange`` cuts keys and values into parts and brings them into panels of 32
(:mod:`bidm_cli.packed.cpu.codegen.amx_floats`). ``amx_attend`` takes some blocks of 32 queries and goes
through the keys once, a few panels at a time: the scores of a block, transposed, stay in the first-level
cache, become weights, and are multiplied by the values. m_i is the largest score of the first few panels; it
is only raised, and what was summed up so far scaled, where a later score is larger by more than
``softmax.SLACK``. Weights of one block are made while the matrix unit multiplies for the one before and the
one after.

Lanes and rows past the end are zeros, but scores of keys past the end are -inf, and so weigh nothing.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.amx import TILE, TILE_BYTES, close_tiles, open_tiles
from bidm_cli.packed.cpu.codegen.amx_floats import (
    BLOCK_BYTES,
    PART_BYTES,
    ROW_BYTES,
    SIDE,
    add_product,
    start_block,
    store_block,
)
from bidm_cli.packed.cpu.codegen.bfloat import store_parts
from bidm_cli.packed.cpu.codegen.softmax import (
    PAIRS_AT_ONCE,
    column_maxima,
    power_of_two,
    raised,
    weigh,
    weigh_and_multiply,
)
from bidm_cli.packed.cpu.codegen.transpose import transpose_tile
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    arrive,
    first_item,
    load_first_floats,
    load_floats,
    load_long,
    next_item,
    splat,
    stack_bytes,
    store,
    store_first,
    store_long,
)
from bidm_cli.packed.cpu.codegen.vector_math import largest
from bidm_cli.packed.cpu.ops.attention_kernel import item_count, place_of
from bidm_cli.packed.cpu.ops.structs import MATRIX_ATTENTION_ARGS, MATRIX_PANELS, MOST_BLOCKS
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, Source

PANELS = MATRIX_PANELS
"""Panels of keys that are weighed together."""

TASK_BYTES = 40
"""Bytes of a task of the matrix unit: addresses of panels, their size, addresses of blocks."""

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


def make_amx_arrange(parts: int) -> Source:
    """Make the kernel that brings keys and values into panels of so many parts."""
    space_bytes = PART_BYTES * parts

    def amx_arrange(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        space = stack_bytes(space_bytes)
        panels, steps = (args.keys + SIDE - 1) // SIDE, (args.width + SIDE - 1) // SIDE
        wide = (args.value_width + SIDE - 1) // SIDE
        pitch = panels * parts * PART_BYTES
        items = item_count(args, args.keys, SIDE)
        item = first_item(pointer, items)
        while item < items:
            image, head, first, count = place_of(args, item, args.keys, SIDE)
            panel = args.key_panels + item * steps * parts * PART_BYTES
            _arrange_keys(args, image, head, first, count, panel, parts)
            step = args.value_panels + (image * args.heads + head) * wide * pitch
            step += first // SIDE * parts * PART_BYTES
            _arrange_values(args, image, head, first, count, step, pitch, space, parts)
            item = next_item(pointer, items)

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
def _raise_tops(found: Any, tops: Any, sums: Any, factors: Any) -> Any:
    """Raise m of 32 queries where the scores found are too far above it; scale the sums.

    Returns 1 if what was summed up so far has to be scaled by the ``factors``, too, else 0.
    """
    raises = 0
    for at in range(0, ROW_BYTES, _LANES_BYTES):
        top = load_floats(tops + at, TILE)
        # Other lanes stay as they are, so that no query depends on its neighbours.
        new = raised(load_floats(found + at, TILE), top)
        factor = power_of_two(top - new)
        store(factors + at, factor)
        if largest(new - top) > float32(0.0):
            raises = 1
            store(tops + at, new)
            store(sums + at, load_floats(sums + at, TILE) * factor)
    return raises


@njit(inline="always", error_model="numpy")
def _scale(product: Any, wide: Any, factors: Any) -> None:
    """Scale the columns of a block of queries' products."""
    left, right = load_floats(factors, TILE), load_floats(factors + _LANES_BYTES, TILE)
    for row in range(wide * SIDE):
        line = product + ROW_BYTES * row
        store(line, load_floats(line, TILE) * left)
        store(line + _LANES_BYTES, load_floats(line + _LANES_BYTES, TILE) * right)


@njit(inline="always", error_model="numpy")
def _add_task(task: Any, left: Any, right: Any, size: Any, start: Any, into: Any) -> Any:
    """Write a task of the matrix unit: a block of a product of ``size`` bytes of panels.

    Returns the place of the next task.
    """
    store_long(task, left)
    store_long(task + 8, right)
    store_long(task + 16, size)
    store_long(task + 24, start)
    store_long(task + 32, into)
    return task + TASK_BYTES


@njit(inline="always", error_model="numpy")
def _begin(task: Any, at: Any) -> Any:
    """Start a task's block before its first step; returns the addresses of a step."""
    if at == 0:
        start_block(load_long(task + 24))
    return load_long(task) + at, load_long(task + 8) + at


@njit(inline="always", error_model="numpy")
def _end(task: Any, at: Any, parts: Any) -> Any:
    """Store a task's block after its last step; returns the task and the step that come next."""
    at += parts * PART_BYTES
    if at == load_long(task + 16):
        store_block(load_long(task + 32))
        task += TASK_BYTES
        at = 0
    return task, at


@njit(inline="always", error_model="numpy")
def _advance(task: Any, at: Any, count: Any, parts: Any) -> Any:
    """Do some steps of tasks; returns the task and the step that come next."""
    for _ in range(count):
        left, right = _begin(task, at)
        add_product(left, right, parts)
        task, at = _end(task, at, parts)
    return task, at


@njit(inline="always", error_model="numpy")
def _weigh_panels(
    scores: Any, here: Any, top: Any, total: Any, weights: Any, tasks: Any, steps: Any, parts: Any
) -> None:
    """Weigh the keys of some panels, and do the steps of tasks beside that."""
    task, at = tasks, 0
    rounds = here * (TILE // PAIRS_AT_ONCE)
    due = 0
    for p in range(here):
        for i in range(0, TILE, PAIRS_AT_ONCE):
            due += steps
            count = due // rounds
            due -= count * rounds
            block = scores + p * BLOCK_BYTES + i * ROW_BYTES
            into = weights + p * parts * PART_BYTES + i * _LANES_BYTES
            if count:
                task, at = _advance(task, at, count - 1, parts)
                left, right = _begin(task, at)
                weigh_and_multiply(block, top, total, into, left, right, parts)
                task, at = _end(task, at, parts)
            else:
                weigh(block, top, total, into, parts)


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


@njit(inline="always", error_model="numpy")
def _value_tasks(
    tasks: Any, values: Any, pitch: Any, weights: Any, product: Any, wide: Any, size: Any, first: Any
) -> Any:
    """Tasks that add the product of some panels of values and a block's weights to the block's products.

    ``size``: bytes of the panels. ``first``: True where there is nothing to add to. Returns the next place.
    """
    for w in range(wide):
        into = product + w * BLOCK_BYTES
        tasks = _add_task(tasks, values + w * pitch, weights, size, 0 if first else into, into)
    return tasks


@njit(inline="always", error_model="numpy")
def _score_tasks(
    tasks: Any, keys: Any, pitch: Any, queries: Any, scores: Any, here: Any, last: Any, mask: Any
) -> Any:
    """Tasks that multiply a block of queries by some panels of keys; the panel ``last`` is masked."""
    for p in range(here):
        start = mask if p == last else 0
        tasks = _add_task(tasks, keys + p * pitch, queries, pitch, start, scores + p * BLOCK_BYTES)
    return tasks


@njit(inline="always", error_model="numpy")
def _find_tops(scores: Any, here: Any, tops: Any, sums: Any, factors: Any, space: Any, first: Any) -> Any:
    """Set m of a block, or raise it, by new scores; returns 1 if products have to be scaled, else 0."""
    if first:
        column_maxima(scores, here * SIDE, tops)
        store(sums, splat(float32(0.0), SIDE))
        return 0
    column_maxima(scores, here * SIDE, space)
    return _raise_tops(space, tops, sums, factors)


@njit(inline="always", error_model="numpy")
def _place_of_unit(unit: Any, blocks: Any, panels: Any) -> Any:
    """(block, first panel, panels) of a unit of work: ``PANELS`` panels of keys for a block of queries."""
    group = unit // blocks
    return unit - group * blocks, group * PANELS, min(PANELS, panels - group * PANELS)


def make_amx_attend(parts: int) -> Source:
    """Make the attention kernel for numbers of so many parts."""
    step_bytes = parts * PART_BYTES
    score_bytes, weight_bytes = PANELS * BLOCK_BYTES, PANELS * step_bytes
    scores_bytes, weights_bytes = 2 * score_bytes, 2 * weight_bytes
    lane_bytes, factor_bytes = MOST_BLOCKS * ROW_BYTES, 2 * ROW_BYTES

    def amx_attend(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        space, mask = stack_bytes(step_bytes), stack_bytes(BLOCK_BYTES)
        scores, weights = stack_bytes(scores_bytes), stack_bytes(weights_bytes)
        tops, sums, factors = stack_bytes(lane_bytes), stack_bytes(lane_bytes), stack_bytes(factor_bytes)
        panels, steps = (args.keys + SIDE - 1) // SIDE, (args.width + SIDE - 1) // SIDE
        wide, rows = (args.value_width + SIDE - 1) // SIDE, args.blocks * SIDE
        key_pitch, value_pitch = steps * step_bytes, panels * step_bytes
        arrival = arrive(address_of(pointer) + ARRIVALS)
        queries = args.query_panels + arrival * args.blocks * key_pitch
        products = args.products + arrival * args.blocks * wide * BLOCK_BYTES
        tasks = args.tasks + arrival * (wide + PANELS) * TASK_BYTES
        _mask_keys(args.keys - (panels - 1) * SIDE, mask)
        masked = panels - 1 if args.keys % SIDE else -1
        items = item_count(args, args.queries, rows)
        item = first_item(pointer, items)
        if item < items:
            open_tiles()
        while item < items:
            place = place_of(args, item, args.queries, rows)
            pair = place[0] * args.heads + place[1]
            keys = args.key_panels + pair * panels * key_pitch
            values = args.value_panels + pair * wide * value_pitch
            _take_queries(args, place, queries, key_pitch, space, parts)
            blocks = (place[3] + SIDE - 1) // SIDE
            units = blocks * ((panels + PANELS - 1) // PANELS)
            # A unit's scores, weights and products are made one after the other, of three units at once.
            raises = 0
            for time in range(units + 2):
                odd, task, todo = time & 1, tasks, 0
                new_scores, old_weights = scores + odd * score_bytes, weights + odd * weight_bytes
                if time >= 2:
                    block, panel, here = _place_of_unit(time - 2, blocks, panels)
                    product = products + block * wide * BLOCK_BYTES
                    if (raises >> odd) & 1:
                        _scale(product, wide, factors + odd * ROW_BYTES)
                    at, size = values + panel * step_bytes, here * step_bytes
                    task = _value_tasks(task, at, value_pitch, old_weights, product, wide, size, panel == 0)
                    todo += here * wide
                if time < units:
                    block, panel, here = _place_of_unit(time, blocks, panels)
                    at, query, last = keys + panel * key_pitch, queries + block * key_pitch, masked - panel
                    task = _score_tasks(task, at, key_pitch, query, new_scores, here, last, mask)
                    todo += here * steps
                if 1 <= time <= units:
                    block, panel, here = _place_of_unit(time - 1, blocks, panels)
                    top, total = tops + block * ROW_BYTES, sums + block * ROW_BYTES
                    old_scores = scores + (1 - odd) * score_bytes
                    new_weights = weights + (1 - odd) * weight_bytes
                    _weigh_panels(old_scores, here, top, total, new_weights, tasks, todo, parts)
                else:
                    _advance(tasks, 0, todo, parts)
                if time < units:
                    block, panel, here = _place_of_unit(time, blocks, panels)
                    top, total = tops + block * ROW_BYTES, sums + block * ROW_BYTES
                    factor = factors + odd * ROW_BYTES
                    found = _find_tops(new_scores, here, top, total, factor, space, panel == 0)
                    raises = (raises & ~(1 << odd)) | (found << odd)
            _write_outputs(args, place, products, wide, sums, space)
            item = next_item(pointer, items)
            if item >= items:
                close_tiles()

    return amx_attend, MATRIX_ATTENTION_ARGS
