"""Conv kernel: binary convolution over words, with the whole epilogue in the store.

With the activations' words in a border of zeros, every window is complete and

    D = correction - 2 popcount(window xor filter)

where the correction counts what the zeros of taps outside the image got wrong: the words there are 0, so they
add popcount(w), and their channels do not count. It depends on which taps are inside, a few classes of rows
and columns of the output. Then

    y = D * K * alpha + bias + |s| P + offset + residual,     K = sum over the window's taps of k * A

With more activation planes D = D_1 + g_1 D_2 + g_2 D_3, multiplied and added in this order without fused
steps, each D_i from its own plane's words and the same filters. A row is one pixel's window in one plane. A
tile that counts pairs takes two rows at once, from a copy of the item's windows in which they take turns
(:mod:`bidm_cli.packed.cpu.codegen.paired`).

P repeats the channels of ``shortcut`` (O >= C), or averages those equal mod O (O < C); it may be a virtual
concat (:mod:`bidm_cli.packed.cpu.codegen.concat_load`).

Work is shared in items of up to CONV_BLOCK pixels x planes and some groups of filters. A group's weights
stay in the first-level cache while the item's rows pass.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.concat_load import load_channels, load_repeated
from bidm_cli.packed.cpu.codegen.isa import Tile
from bidm_cli.packed.cpu.codegen.paired import pair_rows
from bidm_cli.packed.cpu.codegen.popcount import count_tile
from bidm_cli.packed.cpu.codegen.vector import (
    first_item,
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
from bidm_cli.packed.cpu.ops.structs import CONV_ARGS, CONV_BLOCK, PAIRED_BYTES
from bidm_cli.packed.cpu.runtime.args import Source

MOST_PIXELS = 32
"""Most rows of a tile of the inner loop."""

TABLES = 5
"""Lines of :func:`locate`'s table, int64: addresses of each row's window, and of each pixel's correction,
offset and both tensors of the shortcut; a line of float32 with the scales follows."""

_LINE = 8 * (CONV_BLOCK + MOST_PIXELS)

TABLE_BYTES = (TABLES + 1) * _LINE


@njit(inline="always", error_model="numpy")
def _scale(args: Any, corner: Any) -> Any:
    """K of the window at ``corner``."""
    scale = float32(0.0)
    for dy in range(args.rows):
        line = args.sums + 4 * (corner + dy * args.padded_width)
        k = args.scale_filter + 4 * dy * args.columns
        for dx in range(args.columns):
            scale += load_float(line + 4 * dx) * load_float(k + 4 * dx)
    return scale


@njit(inline="always", error_model="numpy")
def locate(args: Any, first: Any, count: Any, tables: Any) -> None:
    """Tabulate each output pixel's addresses of windows, correction, offset and shortcut, and its scale K."""
    size = args.out_height * args.out_width
    for i in range(count):
        p = first + i
        image = p // size
        y = (p - image * size) // args.out_width
        x = p - image * size - y * args.out_width
        corner = (image * args.padded_height + y * args.stride_y) * args.padded_width + x * args.stride_x
        kind = load_int(args.row_class + 4 * y) * args.column_classes + load_int(args.column_class + 4 * x)
        entry = tables + 8 * i
        for plane in range(args.planes):
            window = args.bits + plane * args.plane_bytes + corner * args.pixel_bytes
            store_long(tables + 8 * (i * args.planes + plane), window)
        store_long(entry + _LINE, args.corrections + 4 * kind * args.correction_pitch)
        store_long(entry + 2 * _LINE, args.offset + 4 * image * args.out_channels)
        if args.shortcut:
            line = image * args.map_rows + load_int(args.map_y + 4 * y)
            position = line * args.map_columns + load_int(args.map_x + 4 * x)
            split = args.shortcut_split
            second = position * (args.shortcut_channels - split) - split
            store_long(entry + 3 * _LINE, args.shortcut + 4 * position * split)
            store_long(entry + 4 * _LINE, args.second_shortcut + 4 * second)
        store_float(tables + 5 * _LINE + 4 * i, _scale(args, corner) if args.sums else float32(1.0))


@njit(inline="always", error_model="numpy")
def _dot(args: Any, counts: Any, pitch: Any, correction: Any, lanes: Any) -> Any:
    """D of a pixel in floats, from its counts, those of a plane every ``pitch`` bytes."""
    n = load_ints(counts, lanes)
    total = to_floats(correction - n - n)
    for plane in range(1, args.planes):
        n = load_ints(counts + plane * pitch, lanes)
        scale = splat(load_float(args.plane_scales + 4 * (plane - 1)), lanes)
        total = total + scale * to_floats(correction - n - n)
    return total


@njit(inline="always", error_model="numpy")
def finish(
    args: Any,
    first: Any,
    count: Any,
    channel: Any,
    counts: Any,
    pixel_pitch: Any,
    plane_pitch: Any,
    tables: Any,
    lanes: Any,
) -> None:
    """The epilogue of ``count`` pixels from ``first`` on and of the ``lanes`` channels from ``channel`` on.

    ``counts`` is the address of these channels' counts; both pitches are in bytes.
    """
    left = args.out_channels - channel
    weight_scale = load_floats(args.weight_scale + 4 * channel, lanes)
    bias = load_floats(args.bias + 4 * channel, lanes)
    # P: channels ``step`` apart are averaged; there is one where there are fewer than O.
    step, split = min(max(args.shortcut_channels, 1), args.out_channels), args.shortcut_split
    terms = max((args.shortcut_channels - channel + step - 1) // step, 1)
    from_channel = channel % step
    strength = splat(args.shortcut_scale / float32(terms), lanes)
    for i in range(count):
        entry = tables + 8 * i
        correction = load_ints(load_long(entry + _LINE) + 4 * channel, lanes)
        dot = _dot(args, counts + i * pixel_pitch, plane_pitch, correction, lanes)
        scale = splat(load_float(tables + 5 * _LINE + 4 * i), lanes)
        out = fused(dot * scale, weight_scale, bias)
        target = 4 * ((first + i) * args.out_channels + channel)
        offset = load_long(entry + 2 * _LINE) + 4 * channel
        here, there = load_long(entry + 3 * _LINE), load_long(entry + 4 * _LINE)
        if left >= lanes:
            if args.shortcut:
                part = load_repeated(here, there, split, from_channel, step, terms, lanes)
                out = fused(part, strength, out)
            if args.offset:
                out = out + load_floats(offset, lanes)
            if args.residual:
                out = out + load_floats(args.residual + target, lanes)
            store(args.out + target, out)
        else:
            if args.shortcut:
                part = load_channels(here, there, split, from_channel, left, lanes)
                out = fused(part, strength, out)
            if args.offset:
                out = out + load_first_floats(offset, left, lanes)
            if args.residual:
                out = out + load_first_floats(args.residual + target, left, lanes)
            store_first(args.out + target, out, left)


@njit(inline="always", error_model="numpy")
def _pair(args: Any, rows: Any, run: Any, pitch: Any, tables: Any, paired: Any) -> Any:
    """Copy the windows of ``rows`` rows to ``paired`` two by two, and tabulate the pairs instead.

    Returns the number of pairs; an odd last row goes with itself.
    """
    for pair in range((rows + 1) // 2):
        first = load_long(tables + 16 * pair)
        second = load_long(tables + 16 * pair + 8) if 2 * pair + 1 < rows else first
        into = paired + 8 * pair * args.rows * run
        for row in range(args.rows):
            pair_rows(first + row * pitch, second + row * pitch, run, into + 8 * row * run)
        store_long(tables + 8 * pair, into)
    return (rows + 1) // 2


def make_conv(method: str, lanes: int, tile_pixels: int, tile_vectors: int) -> Source:
    """Make the kernel for one form of the inner loop."""
    pairs = Tile(method, lanes, tile_pixels, tile_vectors).pairs
    together = 2 if pairs else 1
    filters, most = lanes * tile_vectors, CONV_BLOCK + together * tile_pixels
    count_space, count_pitch = 4 * most * filters, 4 * filters
    paired_space = PAIRED_BYTES if pairs else 8

    def conv(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        tables, counts, paired = stack_bytes(TABLE_BYTES), stack_bytes(count_space), stack_bytes(paired_space)
        pixels = args.images * args.out_height * args.out_width
        run, runs = args.columns * args.words, args.rows
        pitch = 4 * args.padded_width * args.words
        weights_size = 4 * runs * run * filters
        splits = (args.groups + args.group_step - 1) // args.group_step
        items = (pixels + args.block - 1) // args.block * splits
        item = first_item(pointer, items)
        while item < items:
            block = item // splits
            first = block * args.block
            first_group = (item - block * splits) * args.group_step
            count = min(args.block, pixels - first)
            locate(args, first, count, tables)
            tiled = count * args.planes
            if pairs:
                tiled = _pair(args, tiled, run, pitch, tables, paired)
            for i in range(tiled, tiled + tile_pixels):
                store_long(tables + 8 * i, load_long(tables))

            for group in range(first_group, min(first_group + args.group_step, args.groups)):
                for start in range(0, tiled, tile_pixels):
                    count_tile(
                        tables + 8 * start,
                        args.weights + group * weights_size,
                        1 if pairs else runs,
                        runs * run if pairs else run,
                        pitch,
                        counts + start * together * count_pitch,
                        method,
                        lanes,
                        tile_pixels,
                        tile_vectors,
                    )
                for channel in range(group * filters, min((group + 1) * filters, args.out_channels), lanes):
                    found = counts + 4 * (channel - group * filters)
                    pixel_pitch = args.planes * count_pitch
                    finish(args, first, count, channel, found, pixel_pitch, count_pitch, tables, lanes)
            item = next_item(pointer, items)

    return conv, CONV_ARGS
