"""Norm kernel: a group norm as one factor and one offset per channel, x * factor + offset.

    factor = gamma / sqrt(var + eps) * (1 + scale)        offset = (beta - mean * gamma / sqrt(var + eps))
                                                                    * (1 + scale) + shift

Blocks of pixels are summed by all threads; the one that finishes an image's last block computes its factors.
Sums are of x - x[first pixel], so that a mean far from zero costs no digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.concat_load import load_channels
from bidm_cli.packed.cpu.codegen.vector import (
    add_to_shared,
    first_item,
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
from bidm_cli.packed.cpu.ops.structs import NORM_ARGS
from bidm_cli.packed.cpu.runtime.args import Source

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
def _channel_moments(args: Any, x: Any, second: Any, sums: Any) -> None:
    """Replace the first block's sums by each channel's mean and sum of squared deviations over all blocks."""
    chunks = (args.channels + 31) // 32
    line = 128 * chunks
    share = splat(float32(1.0 / args.pixels), 32)
    for w in range(chunks):
        count = min(32, args.channels - 32 * w)
        total, squares = splat(float32(0.0), 32), splat(float32(0.0), 32)
        for b in range(args.blocks):
            total = total + load_floats(sums + 2 * b * line + 128 * w, 32)
            squares = squares + load_floats(sums + (2 * b + 1) * line + 128 * w, 32)
        mean = total * share
        store(sums + 128 * w, load_channels(x, second, args.split, 32 * w, count, 32) + mean)
        store(sums + line + 128 * w, squares - total * mean)


@njit(inline="always", error_model="numpy")
def _factors(args: Any, image: Any, means: Any, deviations: Any, factors: Any, offsets: Any) -> None:
    """Each channel's factor and offset, from the moments of its group."""
    width = args.channels // args.groups
    for g in range(args.groups):
        mean, deviation = 0.0, 0.0
        for c in range(g * width, (g + 1) * width):
            mean += load_float(means + 4 * c)
        mean /= width
        for c in range(g * width, (g + 1) * width):
            away = load_float(means + 4 * c) - mean
            deviation += load_float(deviations + 4 * c) + args.pixels * away * away
        slope = 1.0 / np.sqrt(max(deviation / (args.pixels * width), 0.0) + args.epsilon)
        for c in range(g * width, (g + 1) * width):
            factor, offset = slope, -mean * slope
            if args.gamma:
                factor *= load_float(args.gamma + 4 * c)
                offset = offset * load_float(args.gamma + 4 * c) + load_float(args.beta + 4 * c)
            if args.scale:
                more = 1.0 + load_float(args.scale + 4 * (image * args.film_pitch + c))
                factor *= more
                offset = offset * more + load_float(args.shift + 4 * (image * args.film_pitch + c))
            store_float(factors + 4 * c, float32(factor))
            store_float(offsets + 4 * c, float32(offset))


def make_norm() -> Source:
    """Make the norm kernel."""

    def norm(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        line = 128 * ((args.channels + 31) // 32)
        items = args.images * args.blocks
        item = first_item(pointer, items)
        while item < items:
            image = item // args.blocks
            first = (item - image * args.blocks) * args.block
            last = min(first + args.block, args.pixels)
            x = args.x + 4 * image * args.pixels * args.split
            second = args.second + 4 * image * args.pixels * (args.channels - args.split)
            sums = args.sums + 2 * item * line
            for part in range(1 if args.split == args.channels else 2):
                at, width = (second, args.channels - args.split) if part else (x, args.split)
                there = sums + 4 * part * args.split
                _sum_pixels(at, width, there, there + line, first, last)
            if add_to_shared(args.finished + 8 * image, 1) == args.blocks - 1:
                store_long(args.finished + 8 * image, 0)
                sums = args.sums + 2 * image * args.blocks * line
                _channel_moments(args, x, second - 4 * args.split, sums)
                factors, offsets = args.factors + image * line, args.offsets + image * line
                _factors(args, image, sums, sums + line, factors, offsets)
            item = next_item(pointer, items)

    return norm, NORM_ARGS
