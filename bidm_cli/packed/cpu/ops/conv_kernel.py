"""Binary convolution over words, with the whole epilogue in the store.

With the activations' words in a border of zeros, every window is complete and

    D = correction - 2 popcount(window xor filter)

where the correction counts what the zeros of taps outside the image got wrong: the words there are 0, so they
add popcount(w), and their channels do not count. It depends on which taps are inside, a few classes of rows
and columns of the output. Then

    y = D * K * alpha + bias + |s| P + offset + residual,     K = sum over the window's taps of k * A

P repeats the channels of ``shortcut`` (O >= C), or averages those equal mod O (O < C); they may lie in two
places (:mod:`bidm_cli.packed.cpu.codegen.concat_load`).

Work is shared in items of up to BLOCK output pixels x some groups of filters. A group's weights stay in the
first-level cache while the item's pixels pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.concat_load import load_channels, load_repeated
from bidm_cli.packed.cpu.codegen.popcount import count_tile
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    joined,
    load_first_floats,
    load_float,
    load_floats,
    load_int,
    load_ints,
    load_long,
    next_item,
    splat,
    stack_bytes,
    store,
    store_first,
    store_float,
    store_long,
    to_floats,
)
from bidm_cli.packed.cpu.codegen.vector_math import fused
from bidm_cli.packed.cpu.runtime.args import BLOCK, MOST_PIXELS

TABLES = 5
"""What :func:`_locate` says about each pixel, a line of int64 each: window, correction, offset, both parts of
the shortcut; a line of float32 with the scales follows."""

_LINE = 8 * (BLOCK + MOST_PIXELS)


@njit(inline="always", error_model="numpy")
def _scale(job: Any, corner: Any) -> Any:
    """K of the window at ``corner``."""
    scale = float32(0.0)
    for dy in range(job.rows):
        line = job.sums + 4 * (corner + dy * job.padded_width)
        k = job.scale_filter + 4 * dy * job.columns
        for dx in range(job.columns):
            scale += load_float(line + 4 * dx) * load_float(k + 4 * dx)
    return scale


@njit(inline="always", error_model="numpy")
def _locate(job: Any, first: Any, count: Any, tables: Any) -> None:
    """Where each output pixel's window, correction, offset and shortcut cell start, and its scale K."""
    size = job.out_height * job.out_width
    for i in range(count):
        p = first + i
        image = p // size
        y = (p - image * size) // job.out_width
        x = p - image * size - y * job.out_width
        corner = (image * job.padded_height + y * job.stride_y) * job.padded_width + x * job.stride_x
        kind = load_int(job.row_class + 4 * y) * job.column_classes + load_int(job.column_class + 4 * x)
        entry = tables + 8 * i
        store_long(entry, job.bits + 4 * corner * job.words)
        store_long(entry + _LINE, job.corrections + 4 * kind * job.correction_pitch)
        store_long(entry + 2 * _LINE, job.offset + 4 * image * job.out_channels)
        if job.shortcut:
            line = image * job.cell_rows + load_int(job.cell_y + 4 * y)
            cell = line * job.cell_columns + load_int(job.cell_x + 4 * x)
            split = job.shortcut_split
            second = cell * (job.shortcut_channels - split) - split
            store_long(entry + 3 * _LINE, job.shortcut + 4 * cell * split)
            store_long(entry + 4 * _LINE, job.second_shortcut + 4 * second)
        store_float(tables + 5 * _LINE + 4 * i, _scale(job, corner) if job.sums else float32(1.0))


@njit(inline="always", error_model="numpy")
def _finish(
    job: Any, first: Any, count: Any, channel: Any, counts: Any, pitch: Any, tables: Any, lanes: Any
) -> None:
    """The epilogue of ``count`` pixels from ``first`` on and of the ``lanes`` channels from ``channel`` on.

    ``counts`` is where these channels' counts start, a pixel every ``pitch`` bytes.
    """
    left = job.out_channels - channel
    weight_scale = load_floats(job.weight_scale + 4 * channel, lanes)
    bias = load_floats(job.bias + 4 * channel, lanes)
    # P: channels ``step`` apart are averaged; there is one where there are fewer than O.
    step, split = min(max(job.shortcut_channels, 1), job.out_channels), job.shortcut_split
    terms = max((job.shortcut_channels - channel + step - 1) // step, 1)
    from_channel = channel % step
    strength = splat(job.shortcut_scale / float32(terms), lanes)
    for i in range(count):
        entry = tables + 8 * i
        n = load_ints(counts + i * pitch, lanes)
        dot = load_ints(load_long(entry + _LINE) + 4 * channel, lanes) - n - n
        scale = splat(load_float(tables + 5 * _LINE + 4 * i), lanes)
        out = fused(to_floats(dot) * scale, weight_scale, bias)
        target = 4 * ((first + i) * job.out_channels + channel)
        offset = load_long(entry + 2 * _LINE) + 4 * channel
        here, there = load_long(entry + 3 * _LINE), load_long(entry + 4 * _LINE)
        if left >= lanes:
            if job.shortcut:
                part = load_repeated(here, there, split, from_channel, step, terms, lanes)
                out = fused(part, strength, out)
            if job.offset:
                out = out + load_floats(offset, lanes)
            if job.residual:
                out = out + load_floats(job.residual + target, lanes)
            store(job.out + target, out)
        else:
            if job.shortcut:
                part = load_channels(here, there, split, from_channel, left, lanes)
                out = fused(part, strength, out)
            if job.offset:
                out = out + load_first_floats(offset, left, lanes)
            if job.residual:
                out = out + load_first_floats(job.residual + target, left, lanes)
            store_first(job.out + target, out, left)


def conv_kernel(method: str, lanes: int, tile_pixels: int, tile_vectors: int) -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.runtime.compile.compiled`; reads a CONV_JOB."""
    filters, most = lanes * tile_vectors, BLOCK + tile_pixels
    space, count_space, count_pitch = (TABLES + 1) * _LINE, 4 * most * filters, 4 * filters

    def conv(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        tables, counts = stack_bytes(space), stack_bytes(count_space)
        pixels = job.images * job.out_height * job.out_width
        run = job.columns * job.words
        pitch = 4 * job.padded_width * job.words
        splits = (job.groups + job.group_step - 1) // job.group_step
        found_work = False
        while True:
            item = next_item(address_of(jobs))
            block = item // splits
            first = block * job.block
            if first >= pixels:
                break
            found_work = True
            first_group = (item - block * splits) * job.group_step
            count = min(job.block, pixels - first)
            _locate(job, first, count, tables)
            for i in range(count, count + tile_pixels):
                store_long(tables + 8 * i, load_long(tables))

            for group in range(first_group, min(first_group + job.group_step, job.groups)):
                weights = job.weights + 4 * group * job.rows * run * filters
                for start in range(0, count, tile_pixels):
                    windows, into = tables + 8 * start, counts + start * count_pitch
                    count_tile(
                        windows, weights, job.rows, run, pitch, into, method, lanes, tile_pixels, tile_vectors
                    )
                for channel in range(group * filters, min((group + 1) * filters, job.out_channels), lanes):
                    found = counts + 4 * (channel - group * filters)
                    _finish(job, first, count, channel, found, count_pitch, tables, lanes)
        joined(jobs, found_work)

    return conv
