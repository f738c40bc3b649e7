"""Binarize and pack: activations become words, and their magnitudes are summed, in one pass.

For pixel p and channel c of float32 x [images, height, width, channels]:

    bit c of the words of p    x[p, c] >= -tau[c]
    sums[p]                    sum over c of |x[p, c]|, divided by ``divisor``

Both are written inside a border of zeros as wide as the convolution's padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32, int64

from bidm_cli.packed.cpu.vector import (
    address_of,
    bits_at_least,
    load_first_floats,
    load_floats,
    magnitudes,
    next_item,
    splat,
    store_float,
    store_int,
    total,
)


def pack_kernel() -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.kernels.compiled`; reads a PACK_JOB."""

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
                x = int64(job.x + 4 * p * job.channels)
                bits = int64(job.bits + 4 * target * job.words)
                magnitude = splat(float32(0.0), 32)
                for w in range(whole):
                    v = load_floats(x + 128 * w, 32)
                    store_int(bits + 4 * w, bits_at_least(v, load_floats(job.limits + 128 * w, 32)))
                    magnitude = magnitude + magnitudes(v)
                if rest:
                    v = load_first_floats(x + 128 * whole, rest, 32)
                    limits = load_floats(job.limits + 128 * whole, 32)
                    store_int(bits + 4 * whole, bits_at_least(v, limits))
                    magnitude = magnitude + magnitudes(v)
                if job.sums:
                    store_float(job.sums + 4 * target, total(magnitude) / job.divisor)

    return pack
