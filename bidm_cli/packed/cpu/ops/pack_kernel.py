"""Pack kernel: binarize activations to words and sum their magnitudes in one pass.

For pixel p and channel c of float32 x [images, height, width, channels], with

    v = x[p, c]                                           plain
    v = x[p, c] * factors[image, c] + offsets[image, c]   after a group norm, and SiLU on top if asked for
    v = x[p, c] / ||x[p]|| * factors[image, c] + ...      the same after an RMS norm

it writes

    bit c of the words of p    v >= -tau[c]; in further planes rest >= 0. Bytes for a matrix unit
    sums[p]                    sum over c of |v|, divided by ``divisor``
    values[position, c]        mean of v over the pixels of a shortcut map position (one, or a stride's)

each if it has an address. The rest is z = v + tau[c], less delta_i[c] times the sign in plane i for each
plane so far, every subtraction rounded (:mod:`bidm_cli.binary.planes`). Words and sums lie inside a border
of zeros as wide as the convolution's padding; with ``repeat`` they fill a square of pixels (virtual
upsample). x may be a virtual concat (:mod:`bidm_cli.packed.cpu.codegen.concat_load`). Items are blocks of
positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.concat_load import load_channels
from bidm_cli.packed.cpu.codegen.vector import (
    bits_at_least,
    first_item,
    load_first_floats,
    load_float,
    load_floats,
    load_int,
    magnitudes,
    next_item,
    rest_of,
    splat,
    store,
    store_bits_as_bytes,
    store_first,
    store_float,
    store_int,
    total,
)
from bidm_cli.packed.cpu.codegen.vector_math import fused, silu
from bidm_cli.packed.cpu.ops.structs import PACK_ARGS
from bidm_cli.packed.cpu.runtime.args import Source

SMALLEST = 1e-12
"""Lower bound of ||x||, as in torch's ``normalize``."""


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
    """A position's mean with one more pixel in it; every pixel has the weight ``share``."""
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
def _store_word(args: Any, at: Any, word: Any) -> None:
    """Store a word as it is, or with a byte for each bit."""
    if args.word_bytes == 4:
        store_int(at, word)
    else:
        store_bits_as_bytes(word, at)


@njit(inline="always", error_model="numpy")
def _store_bits(args: Any, bits: Any, w: Any, v: Any) -> None:
    """Store 32 activations' word number ``w`` of every plane; the pixel's first word is at ``bits``."""
    limits, deltas = load_floats(args.limits + 128 * w, 32), args.plane_offsets + 128 * w
    word, z = bits_at_least(v, limits), v - limits
    at = bits + args.word_bytes * w
    _store_word(args, at, word)
    for _ in range(1, args.planes):
        z = rest_of(z, load_floats(deltas, 32))
        at += args.plane_bytes
        deltas += 128 * args.words
        _store_word(args, at, bits_at_least(z, splat(float32(0.0), 32)))


@njit(inline="always", error_model="numpy")
def _pack_pixel(
    args: Any,
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
    """Pack one pixel's channels; returns the sum of their magnitudes."""
    first = args.x + 4 * pixel * args.split
    second = args.second + 4 * (pixel * (args.channels - args.split) - args.split)
    slope = splat(_slope(first, second, args.split, args.channels) if is_rms else float32(1.0), 32)
    magnitude = splat(float32(0.0), 32)
    for w in range((args.channels + 31) // 32):
        count = min(32, args.channels - 32 * w)
        at = 128 * w
        v = load_channels(first, second, args.split, 32 * w, count, 32)
        if is_rms:
            v = v * slope
        v = _prepared(v, factors + at, offsets + at, is_normed, has_silu)
        magnitude = magnitude + magnitudes(v)
        if args.bits:
            _store_bits(args, bits, w, v)
        if args.values:
            if args.pools:
                v = _mean_so_far(v, load_first_floats(values + at, count, 32), share, is_first)
            if count == 32:
                store(values + at, v)
            else:
                store_first(values + at, v, count)
    return total(magnitude)


@njit(inline="always", error_model="numpy")
def _spread_pixel(args: Any, target: Any) -> None:
    """Copy a pixel's words and sum to the rest of its square."""
    for i in range(1, args.repeat * args.repeat):
        there = target + i // args.repeat * args.padded_width + i % args.repeat
        for plane in range(args.planes):
            bits, pitch = args.bits + plane * args.plane_bytes, args.pixel_bytes
            for at in range(0, pitch, 4):
                store_int(bits + there * pitch + at, load_int(bits + target * pitch + at))
        if args.sums:
            store_float(args.sums + 4 * there, load_float(args.sums + 4 * target))


@njit(inline="always", error_model="numpy")
def _pack_position(args: Any, position: Any, is_normed: Any, is_rms: Any, has_silu: Any) -> None:
    """Pack all pixels of one position of the shortcut map."""
    line = position // args.map_columns
    image = line // args.map_rows
    left = (position - line * args.map_columns) * args.pool_width
    top = (line - image * args.map_rows) * args.pool_height
    bottom, right = min(top + args.pool_height, args.height), min(left + args.pool_width, args.width)
    share = float32(1.0) / float32((bottom - top) * (right - left))
    norm = 128 * image * args.words
    for y in range(top, bottom):
        row = (image * args.padded_height + args.top + args.repeat * y) * args.padded_width + args.left
        for x in range(left, right):
            target = row + args.repeat * x
            magnitude = _pack_pixel(
                args,
                (image * args.height + y) * args.width + x,
                args.bits + target * args.pixel_bytes,
                args.values + 4 * position * args.channels,
                args.factors + norm,
                args.offsets + norm,
                share,
                y == top and x == left,
                is_normed,
                is_rms,
                has_silu,
            )
            if args.sums:
                store_float(args.sums + 4 * target, magnitude / args.divisor)
            if args.repeat > 1:
                _spread_pixel(args, target)


def make_pack(form: str) -> Source:
    """Make the kernel in one of its forms."""
    is_normed, is_rms, has_silu = form != "plain", form.startswith("rms"), form.endswith("silu")

    def pack(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        positions = args.images * args.map_rows * args.map_columns
        items = (positions + args.block - 1) // args.block
        item = first_item(pointer, items)
        while item < items:
            first = item * args.block
            for position in range(first, min(first + args.block, positions)):
                _pack_position(args, position, is_normed, is_rms, has_silu)
            item = next_item(pointer, items)

    return pack, PACK_ARGS
