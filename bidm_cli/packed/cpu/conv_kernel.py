"""Binary convolution over words, with the whole epilogue in the store.

With the activations' words in a border of zeros, every window is complete and

    D = correction - 2 popcount(window xor filter)

where the correction counts what the zeros of taps outside the image got wrong: the words there are 0, so they
add popcount(w), and their channels do not count. It depends on which taps are inside, a few classes of rows
and columns of the output. Then

    y = D * K * alpha + bias + |s| P + offset + residual,     K = sum over the window's taps of k * A

P repeats the channels of ``shortcut`` (O >= C), or averages those equal mod O (O < C).

Work is shared in items of up to BLOCK output pixels x some groups of filters. A group's weights stay in the
first-level cache while the item's pixels pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.count import count_tile
from bidm_cli.packed.cpu.jobs import BLOCK
from bidm_cli.packed.cpu.vector import (
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
from bidm_cli.packed.cpu.vector_math import fused


@njit(inline="always", error_model="numpy")
def _locate(
    job: Any,
    first: Any,
    count: Any,
    windows: Any,
    corrections: Any,
    offsets: Any,
    sources: Any,
    scales: Any,
) -> None:
    """Where each output pixel's window, correction, offset and shortcut cell start, and its scale K."""
    size = job.out_height * job.out_width
    for i in range(count):
        p = first + i
        image = p // size
        y = (p - image * size) // job.out_width
        x = p - image * size - y * job.out_width
        corner = (image * job.padded_height + y * job.stride_y) * job.padded_width + x * job.stride_x
        store_long(windows + 8 * i, job.bits + 4 * corner * job.words)
        kind = load_int(job.row_class + 4 * y) * job.column_classes + load_int(job.column_class + 4 * x)
        store_long(corrections + 8 * i, job.corrections + 4 * kind * job.correction_pitch)
        store_long(offsets + 8 * i, job.offset + 4 * image * job.out_channels)
        if job.shortcut:
            line = image * job.cell_rows + load_int(job.cell_y + 4 * y)
            cell = line * job.cell_columns + load_int(job.cell_x + 4 * x)
            store_long(sources + 8 * i, job.shortcut + 4 * cell * job.shortcut_channels)
        scale = float32(1.0)
        if job.sums:
            scale = float32(0.0)
            for dy in range(job.rows):
                line = job.sums + 4 * (corner + dy * job.padded_width)
                k = job.scale_filter + 4 * dy * job.columns
                for dx in range(job.columns):
                    scale += load_float(line + 4 * dx) * load_float(k + 4 * dx)
        store_float(scales + 4 * i, scale)


@njit(inline="always", error_model="numpy")
def _finish(
    job: Any,
    first: Any,
    count: Any,
    channel: Any,
    counts: Any,
    pitch: Any,
    corrections: Any,
    offsets: Any,
    sources: Any,
    scales: Any,
    lanes: Any,
) -> None:
    """The epilogue of ``count`` pixels from ``first`` on and of the ``lanes`` channels from ``channel`` on.

    ``counts`` is where these channels' counts start, a pixel every ``pitch`` bytes.
    """
    left = job.out_channels - channel
    weight_scale = load_floats(job.weight_scale + 4 * channel, lanes)
    bias = load_floats(job.bias + 4 * channel, lanes)
    # P: channels ``step`` apart are averaged; there is one where there are fewer than O.
    step = min(max(job.shortcut_channels, 1), job.out_channels)
    terms = max((job.shortcut_channels - channel + step - 1) // step, 1)
    source = 4 * (channel % step)
    strength = splat(job.shortcut_scale / float32(terms), lanes)
    for i in range(count):
        n = load_ints(counts + i * pitch, lanes)
        dot = load_ints(load_long(corrections + 8 * i) + 4 * channel, lanes) - n - n
        out = fused(to_floats(dot) * splat(load_float(scales + 4 * i), lanes), weight_scale, bias)
        target = 4 * ((first + i) * job.out_channels + channel)
        shortcut = load_long(sources + 8 * i) + source
        offset = load_long(offsets + 8 * i) + 4 * channel
        if left >= lanes:
            if job.shortcut:
                part = load_floats(shortcut, lanes)
                for j in range(1, terms):
                    part = part + load_floats(shortcut + 4 * j * step, lanes)
                out = fused(part, strength, out)
            if job.offset:
                out = out + load_floats(offset, lanes)
            if job.residual:
                out = out + load_floats(job.residual + target, lanes)
            store(job.out + target, out)
        else:
            if job.shortcut:
                out = fused(load_first_floats(shortcut, left, lanes), strength, out)
            if job.offset:
                out = out + load_first_floats(offset, left, lanes)
            if job.residual:
                out = out + load_first_floats(job.residual + target, left, lanes)
            store_first(job.out + target, out, left)


def conv_kernel(method: str, lanes: int, tile_pixels: int, tile_vectors: int) -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.kernels.compiled`; reads a CONV_JOB."""
    filters, most = lanes * tile_vectors, BLOCK + tile_pixels
    space, scale_space = 8 * most, 4 * most
    count_space, count_pitch = 4 * most * filters, 4 * filters

    def conv(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        windows, corrections = stack_bytes(space), stack_bytes(space)
        offsets, sources = stack_bytes(space), stack_bytes(space)
        scales, counts = stack_bytes(scale_space), stack_bytes(count_space)
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
            _locate(job, first, count, windows, corrections, offsets, sources, scales)
            for i in range(count, count + tile_pixels):
                store_long(windows + 8 * i, load_long(windows))

            for group in range(first_group, min(first_group + job.group_step, job.groups)):
                weights = job.weights + 4 * group * job.rows * run * filters
                for start in range(0, count, tile_pixels):
                    count_tile(
                        windows + 8 * start,
                        weights,
                        job.rows,
                        run,
                        pitch,
                        counts + start * count_pitch,
                        method,
                        lanes,
                        tile_pixels,
                        tile_vectors,
                    )
                for v in range(tile_vectors):
                    channel = group * filters + v * lanes
                    if channel < job.out_channels:
                        found = counts + 4 * v * lanes
                        _finish(
                            job,
                            first,
                            count,
                            channel,
                            found,
                            count_pitch,
                            corrections,
                            offsets,
                            sources,
                            scales,
                            lanes,
                        )
        joined(jobs, found_work)

    return conv
