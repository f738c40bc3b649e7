"""Binarize and pack: activations become words, and their magnitudes are summed, in one pass.

For pixel p and channel c of float32 x [images, height, width, channels], with

    v = x[p, c]                                         plain
    v = x[p, c] * factors[image, c] + offsets[image, c]   after a group norm, and SiLU on top if asked for

it writes

    bit c of the words of p    v >= -tau[c]
    sums[p]                    sum over c of |v|, divided by ``divisor``
    values[p, c]               v itself, where somebody needs it

each if it has a place to go. Words and sums lie inside a border of zeros as wide as the convolution's
padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32

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


def pack_kernel(form: str) -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.kernels.compiled`; reads a PACK_JOB."""
    is_normed, has_silu = form != "plain", form == "normed_silu"

    def pack(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        whole, rest = job.channels // 32, job.channels % 32
        pixels = job.images * job.height * job.width
        while True:
            first = next_item(address_of(jobs)) * job.block
            if first >= pixels:
                break
            for p in range(first, min(first + job.block, pixels)):
                line = p // job.width
                column = p - line * job.width
                image = line // job.height
                row = line - image * job.height + image * job.padded_height + job.top
                target = row * job.padded_width + column + job.left
                x = job.x + 4 * p * job.channels
                values = job.values + 4 * p * job.channels
                factors = job.factors + 128 * image * job.words
                offsets = job.offsets + 128 * image * job.words
                bits = job.bits + 4 * target * job.words
                magnitude = splat(float32(0.0), 32)
                for w in range(whole):
                    v = load_floats(x + 128 * w, 32)
                    if is_normed:
                        v = fused(v, load_floats(factors + 128 * w, 32), load_floats(offsets + 128 * w, 32))
                    if has_silu:
                        v = silu(v)
                    if job.bits:
                        store_int(bits + 4 * w, bits_at_least(v, load_floats(job.limits + 128 * w, 32)))
                    magnitude = magnitude + magnitudes(v)
                    if job.values:
                        store(values + 128 * w, v)
                if rest:
                    v = load_first_floats(x + 128 * whole, rest, 32)
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
                        store_first(values + 128 * whole, v, rest)
                if job.sums:
                    store_float(job.sums + 4 * target, total(magnitude) / job.divisor)

    return pack
