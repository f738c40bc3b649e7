"""Binarize and pack: activations become words, and their magnitudes are summed, in one pass.

For pixel p and channel c of float32 x [images, height, width, channels], with

    v = x[p, c]                                         plain
    v = x[p, c] * factors[image, c] + offsets[image, c]   after a group norm, and SiLU on top if asked for

it writes

    bit c of the words of p    v >= -tau[c]
    sums[p]                    sum over c of |v|, divided by ``divisor``
    values[cell, c]            mean of v over a cell of pixels (one pixel, or a stride's, cut by the border)

each if it has a place to go. Words and sums lie inside a border of zeros as wide as the convolution's
padding. Threads take blocks of cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.vector import (
    address_of,
    bits_at_least,
    joined,
    load_first_floats,
    load_floats,
    magnitudes,
    next_item,
    splat,
    store,
    store_first,
    store_float,
    store_int,
    total,
)
from bidm_cli.packed.cpu.vector_math import fused, silu

FORMS = ("plain", "normed", "normed_silu")
"""Kernels that :func:`pack_kernel` makes."""


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
def _pack_pixel(
    job: Any,
    source: Any,
    bits: Any,
    values: Any,
    factors: Any,
    offsets: Any,
    share: Any,
    is_first: Any,
    is_normed: Any,
    has_silu: Any,
) -> Any:
    """Everything for one pixel's channels; gives the sum of their magnitudes."""
    whole, rest = job.channels // 32, job.channels % 32
    magnitude = splat(float32(0.0), 32)
    for w in range(whole):
        at = 128 * w
        v = _prepared(load_floats(source + at, 32), factors + at, offsets + at, is_normed, has_silu)
        magnitude = magnitude + magnitudes(v)
        if job.bits:
            store_int(bits + 4 * w, bits_at_least(v, load_floats(job.limits + at, 32)))
        if job.values:
            if job.pools:
                v = _mean_so_far(v, load_floats(values + at, 32), share, is_first)
            store(values + at, v)
    if rest:
        at = 128 * whole
        v = load_first_floats(source + at, rest, 32)
        v = _prepared(v, factors + at, offsets + at, is_normed, has_silu)
        magnitude = magnitude + magnitudes(v)
        if job.bits:
            store_int(bits + 4 * whole, bits_at_least(v, load_floats(job.limits + at, 32)))
        if job.values:
            if job.pools:
                v = _mean_so_far(v, load_first_floats(values + at, rest, 32), share, is_first)
            store_first(values + at, v, rest)
    return total(magnitude)


def pack_kernel(form: str) -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.kernels.compiled`; reads a PACK_JOB."""
    is_normed, has_silu = form != "plain", form == "normed_silu"

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
                line = cell // job.cell_columns
                image = line // job.cell_rows
                left = (cell - line * job.cell_columns) * job.cell_width
                top = (line - image * job.cell_rows) * job.cell_height
                bottom, right = min(top + job.cell_height, job.height), min(left + job.cell_width, job.width)
                share = float32(1.0) / float32((bottom - top) * (right - left))
                norm = 128 * image * job.words
                for y in range(top, bottom):
                    for x in range(left, right):
                        source = (image * job.height + y) * job.width + x
                        target = (image * job.padded_height + job.top + y) * job.padded_width + job.left + x
                        magnitude = _pack_pixel(
                            job,
                            job.x + 4 * source * job.channels,
                            job.bits + 4 * target * job.words,
                            job.values + 4 * cell * job.channels,
                            job.factors + norm,
                            job.offsets + norm,
                            share,
                            y == top and x == left,
                            is_normed,
                            has_silu,
                        )
                        if job.sums:
                            store_float(job.sums + 4 * target, magnitude / job.divisor)
        joined(jobs, found_work)

    return pack
