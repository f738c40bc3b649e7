"""Group norm as one factor and one offset a channel: x * factor + offset.

    factor = gamma / sqrt(var + eps) * (1 + scale)        offset = (beta - mean * gamma / sqrt(var + eps))
                                                                    * (1 + scale) + shift

Blocks of pixels are summed by all threads; whoever finishes an image's last block works out its factors.
Sums are of x - x[first pixel], so that a mean far from zero costs no digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.concat_load import load_channels
from bidm_cli.packed.cpu.codegen.vector import (
    add_to_shared,
    address_of,
    joined,
    load_first_floats,
    load_float,
    load_floats,
    next_item,
    splat,
    store,
    store_first,
    store_float,
    store_long,
)

BLOCK = 128
"""Pixels that a thread takes at a time."""

RUN = 64
"""Pixels that are added up in float32 before their sums are added to those before."""


@njit(inline="always", error_model="numpy")
def _sum_pixels(x: Any, channels: Any, sums: Any, squares_at: Any, first: Any, last: Any) -> None:
    """Sums and sums of squares of each channel over some pixels, less the image's first pixel."""
    for w in range((channels + 31) // 32):
        count = min(32, channels - 32 * w)
        at = x + 128 * w
        shift = load_first_floats(at, count, 32)
        total, squares = splat(float32(0.0), 32), splat(float32(0.0), 32)
        for start in range(first, last, RUN):
            run, run_squares = splat(float32(0.0), 32), splat(float32(0.0), 32)
            for p in range(start, min(start + RUN, last)):
                if count == 32:
                    v = load_floats(at + 4 * p * channels, 32) - shift
                else:
                    v = load_first_floats(at + 4 * p * channels, count, 32) - shift
                run = run + v
                run_squares = run_squares + v * v
            total = total + run
            squares = squares + run_squares
        if count == 32:
            store(sums + 128 * w, total)
            store(squares_at + 128 * w, squares)
        else:
            store_first(sums + 128 * w, total, count)
            store_first(squares_at + 128 * w, squares, count)


@njit(inline="always", error_model="numpy")
def _channel_moments(job: Any, x: Any, second: Any, sums: Any) -> None:
    """Each channel's mean and sum of squared deviations, from all blocks' sums, in place of the first's."""
    chunks = (job.channels + 31) // 32
    line = 128 * chunks
    share = splat(float32(1.0 / job.pixels), 32)
    for w in range(chunks):
        count = min(32, job.channels - 32 * w)
        total, squares = splat(float32(0.0), 32), splat(float32(0.0), 32)
        for b in range(job.blocks):
            total = total + load_floats(sums + 2 * b * line + 128 * w, 32)
            squares = squares + load_floats(sums + (2 * b + 1) * line + 128 * w, 32)
        mean = total * share
        store(sums + 128 * w, load_channels(x, second, job.split, 32 * w, count, 32) + mean)
        store(sums + line + 128 * w, squares - total * mean)


@njit(inline="always", error_model="numpy")
def _factors(job: Any, image: Any, means: Any, deviations: Any, factors: Any, offsets: Any) -> None:
    """Each channel's factor and offset, from the moments of its group."""
    width = job.channels // job.groups
    for g in range(job.groups):
        mean, deviation = 0.0, 0.0
        for c in range(g * width, (g + 1) * width):
            mean += load_float(means + 4 * c)
        mean /= width
        for c in range(g * width, (g + 1) * width):
            away = load_float(means + 4 * c) - mean
            deviation += load_float(deviations + 4 * c) + job.pixels * away * away
        slope = 1.0 / np.sqrt(max(deviation / (job.pixels * width), 0.0) + job.epsilon)
        for c in range(g * width, (g + 1) * width):
            factor, offset = slope, -mean * slope
            if job.gamma:
                factor *= load_float(job.gamma + 4 * c)
                offset = offset * load_float(job.gamma + 4 * c) + load_float(job.beta + 4 * c)
            if job.scale:
                more = 1.0 + load_float(job.scale + 4 * (image * job.film_pitch + c))
                factor *= more
                offset = offset * more + load_float(job.shift + 4 * (image * job.film_pitch + c))
            store_float(factors + 4 * c, float32(factor))
            store_float(offsets + 4 * c, float32(offset))


def norm_kernel() -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.runtime.compile.compiled`; reads a NORM_JOB."""

    def norm(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        line = 128 * ((job.channels + 31) // 32)
        found_work = False
        while True:
            item = next_item(address_of(jobs))
            if item >= job.images * job.blocks:
                break
            found_work = True
            image = item // job.blocks
            first = (item - image * job.blocks) * job.block
            last = min(first + job.block, job.pixels)
            x = job.x + 4 * image * job.pixels * job.split
            second = job.second + 4 * image * job.pixels * (job.channels - job.split)
            sums = job.sums + 2 * item * line
            for part in range(1 if job.split == job.channels else 2):
                at, width = (second, job.channels - job.split) if part else (x, job.split)
                there = sums + 4 * part * job.split
                _sum_pixels(at, width, there, there + line, first, last)
            if add_to_shared(job.finished + 8 * image, 1) == job.blocks - 1:
                store_long(job.finished + 8 * image, 0)
                sums = job.sums + 2 * image * job.blocks * line
                _channel_moments(job, x, second - 4 * job.split, sums)
                factors, offsets = job.factors + image * line, job.offsets + image * line
                _factors(job, image, sums, sums + line, factors, offsets)
        joined(jobs, found_work)

    return norm
