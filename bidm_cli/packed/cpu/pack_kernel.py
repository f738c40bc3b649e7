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
def _mean_so_far(v: Any, before: Any, share: Any, is_first: Any) -> Any:
    """A cell's mean with one more pixel in it; every pixel counts ``share``."""
    scaled = v * splat(share, 32)
    return scaled if is_first else before + scaled


def pack_kernel(form: str) -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.kernels.compiled`; reads a PACK_JOB."""
    is_normed, has_silu = form != "plain", form == "normed_silu"

    def pack(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        whole, rest = job.channels // 32, job.channels % 32
        cells = job.images * job.cell_rows * job.cell_columns
        while True:
            first = next_item(address_of(jobs)) * job.block
            if first >= cells:
                break
            for cell in range(first, min(first + job.block, cells)):
                line = cell // job.cell_columns
                image = line // job.cell_rows
                left = (cell - line * job.cell_columns) * job.cell_width
                top = (line - image * job.cell_rows) * job.cell_height
                bottom, right = min(top + job.cell_height, job.height), min(left + job.cell_width, job.width)
                share = float32(1.0) / float32((bottom - top) * (right - left))
                values = job.values + 4 * cell * job.channels
                factors = job.factors + 128 * image * job.words
                offsets = job.offsets + 128 * image * job.words
                for y in range(top, bottom):
                    for x in range(left, right):
                        is_first = y == top and x == left
                        source = job.x + 4 * ((image * job.height + y) * job.width + x) * job.channels
                        target = (image * job.padded_height + job.top + y) * job.padded_width + job.left + x
                        bits = job.bits + 4 * target * job.words
                        magnitude = splat(float32(0.0), 32)
                        for w in range(whole):
                            v = load_floats(source + 128 * w, 32)
                            if is_normed:
                                at = 128 * w
                                v = fused(v, load_floats(factors + at, 32), load_floats(offsets + at, 32))
                            if has_silu:
                                v = silu(v)
                            if job.bits:
                                limits = load_floats(job.limits + 128 * w, 32)
                                store_int(bits + 4 * w, bits_at_least(v, limits))
                            magnitude = magnitude + magnitudes(v)
                            if job.values:
                                at = values + 128 * w
                                if job.pools:
                                    v = _mean_so_far(v, load_floats(at, 32), share, is_first)
                                store(at, v)
                        if rest:
                            v = load_first_floats(source + 128 * whole, rest, 32)
                            if is_normed:
                                at = 128 * whole
                                v = fused(v, load_floats(factors + at, 32), load_floats(offsets + at, 32))
                            if has_silu:
                                v = silu(v)
                            if job.bits:
                                limits = load_floats(job.limits + 128 * whole, 32)
                                store_int(bits + 4 * whole, bits_at_least(v, limits))
                            magnitude = magnitude + magnitudes(v)
                            if job.values:
                                at = values + 128 * whole
                                if job.pools:
                                    v = _mean_so_far(v, load_first_floats(at, rest, 32), share, is_first)
                                store_first(at, v, rest)
                        if job.sums:
                            store_float(job.sums + 4 * target, total(magnitude) / job.divisor)

    return pack
