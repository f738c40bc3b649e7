"""Binarize and pack: activations become words, and their magnitudes are summed, in one pass.

For pixel p and channel c of float32 x [images, height, width, channels], with

    v = x[p, c]                                         plain
    v = x[p, c] * factors[image, c] + offsets[image, c]   after a group norm, and SiLU on top if asked for
    v = x[p, c] / ||x[p]|| * factors[image, c] + ...      the same after an RMS norm

it writes

    bit c of the words of p    v >= -tau[c]
    sums[p]                    sum over c of |v|, divided by ``divisor``
    values[cell, c]            mean of v over a cell of pixels (one pixel, or a stride's, cut by the border)

each if it has a place to go. Words and sums lie inside a border of zeros as wide as the convolution's
padding; with ``repeat`` they fill a square of pixels, as nearest neighbour upsampling would have. The
channels of x may lie in two places (:mod:`bidm_cli.packed.cpu.codegen.concat_load`). Threads take blocks of cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.concat_load import load_channels
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    bits_at_least,
    joined,
    load_first_floats,
    load_float,
    load_floats,
    load_int,
    magnitudes,
    next_item,
    splat,
    store,
    store_first,
    store_float,
    store_int,
    total,
)
from bidm_cli.packed.cpu.codegen.vector_math import fused, silu

FORMS = ("plain", "normed", "normed_silu", "rms", "rms_silu")
"""Kernels that :func:`pack_kernel` makes."""

SMALLEST = 1e-12
"""What ||x|| is at least, as in torch's ``normalize``."""


@njit(inline="always", error_model="numpy")
def _prepared(v: Any, factors: Any, offsets: Any, is_normed: Any, has_silu: Any) -> Any:
    """32 activations after the norm and SiLU, where the kernel's form has them."""
    if is_normed:
        v = fused(v, load_floats(factors, 32), load_floats(offsets, 32))
    if has_silu:
        v = silu(v)
    return v


@njit(inline="always", error_model="numpy")
def _mean_so_far(v: Any, before: Any, share: Any, is_first: Any) -> Any:
    """A cell's mean with one more pixel in it; every pixel counts ``share``."""
    scaled = v * splat(share, 32)
    return scaled if is_first else before + scaled


@njit(inline="always", error_model="numpy")
def _slope(first: Any, second: Any, split: Any, channels: Any) -> Any:
    """1 / ||x|| of a pixel."""
    squares = splat(float32(0.0), 32)
    for w in range((channels + 31) // 32):
        v = load_channels(first, second, split, 32 * w, min(32, channels - 32 * w), 32)
        squares = squares + v * v
    return float32(1.0) / max(np.sqrt(total(squares)), float32(SMALLEST))


@njit(inline="always", error_model="numpy")
def _pack_pixel(
    job: Any,
    pixel: Any,
    bits: Any,
    values: Any,
    factors: Any,
    offsets: Any,
    share: Any,
    is_first: Any,
    is_normed: Any,
    is_rms: Any,
    has_silu: Any,
) -> Any:
    """Everything for one pixel's channels; gives the sum of their magnitudes."""
    first = job.x + 4 * pixel * job.split
    second = job.second + 4 * (pixel * (job.channels - job.split) - job.split)
    slope = splat(_slope(first, second, job.split, job.channels) if is_rms else float32(1.0), 32)
    magnitude = splat(float32(0.0), 32)
    for w in range((job.channels + 31) // 32):
        count = min(32, job.channels - 32 * w)
        at = 128 * w
        v = load_channels(first, second, job.split, 32 * w, count, 32)
        if is_rms:
            v = v * slope
        v = _prepared(v, factors + at, offsets + at, is_normed, has_silu)
        magnitude = magnitude + magnitudes(v)
        if job.bits:
            store_int(bits + 4 * w, bits_at_least(v, load_floats(job.limits + at, 32)))
        if job.values:
            if job.pools:
                v = _mean_so_far(v, load_first_floats(values + at, count, 32), share, is_first)
            if count == 32:
                store(values + at, v)
            else:
                store_first(values + at, v, count)
    return total(magnitude)


@njit(inline="always", error_model="numpy")
def _spread_pixel(job: Any, target: Any) -> None:
    """Copy a pixel's words and sum to the rest of its square."""
    for i in range(1, job.repeat * job.repeat):
        there = target + i // job.repeat * job.padded_width + i % job.repeat
        bits, copy = job.bits + 4 * target * job.words, job.bits + 4 * there * job.words
        for w in range(job.words):
            store_int(copy + 4 * w, load_int(bits + 4 * w))
        if job.sums:
            store_float(job.sums + 4 * there, load_float(job.sums + 4 * target))


@njit(inline="always", error_model="numpy")
def _pack_cell(job: Any, cell: Any, is_normed: Any, is_rms: Any, has_silu: Any) -> None:
    """All pixels of a cell."""
    line = cell // job.cell_columns
    image = line // job.cell_rows
    left = (cell - line * job.cell_columns) * job.cell_width
    top = (line - image * job.cell_rows) * job.cell_height
    bottom, right = min(top + job.cell_height, job.height), min(left + job.cell_width, job.width)
    share = float32(1.0) / float32((bottom - top) * (right - left))
    norm = 128 * image * job.words
    for y in range(top, bottom):
        row = (image * job.padded_height + job.top + job.repeat * y) * job.padded_width + job.left
        for x in range(left, right):
            target = row + job.repeat * x
            magnitude = _pack_pixel(
                job,
                (image * job.height + y) * job.width + x,
                job.bits + 4 * target * job.words,
                job.values + 4 * cell * job.channels,
                job.factors + norm,
                job.offsets + norm,
                share,
                y == top and x == left,
                is_normed,
                is_rms,
                has_silu,
            )
            if job.sums:
                store_float(job.sums + 4 * target, magnitude / job.divisor)
            if job.repeat > 1:
                _spread_pixel(job, target)


def pack_kernel(form: str) -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.runtime.compile.compiled`; reads a PACK_JOB."""
    is_normed, is_rms, has_silu = form != "plain", form.startswith("rms"), form.endswith("silu")

    def pack(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        cells = job.images * job.cell_rows * job.cell_columns
        found_work = False
        while True:
            first = next_item(address_of(jobs)) * job.block
            if first >= cells:
                break
            found_work = True
            for cell in range(first, min(first + job.block, cells)):
                _pack_cell(job, cell, is_normed, is_rms, has_silu)
        joined(jobs, found_work)

    return pack
