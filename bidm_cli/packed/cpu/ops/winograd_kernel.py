"""Winograd kernels: 3x3 convolutions in floats with a quarter of the products.

    y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A        per 4x4 outputs, from 6x6 inputs d

Source: Lavin and Gray, arXiv 1509.09308, F(4x4, 3x3). ``winograd_weights`` makes G g G^T of a layer's weights
g. ``winograd`` takes some tiles of outputs at a time: B^T d B of their inputs, 36 matrix products over the
channels, and the results' A^T m A stay in a cache of the thread. Inputs may be upsampled by nearest neighbour
on the way; bias and residual are added on the way out.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, njit

from bidm_cli.packed.cpu.codegen.matmul import multiply_tile
from bidm_cli.packed.cpu.codegen.transpose import transpose_tile
from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    arrive,
    first_item,
    load_floats,
    load_long,
    next_item,
    splat,
    stack_bytes,
    store,
    store_long,
)
from bidm_cli.packed.cpu.ops.attention_kernel import point_at
from bidm_cli.packed.cpu.ops.structs import INPUTS, OUTPUTS, POINTS, WINOGRAD_ARGS, WINOGRAD_WEIGHTS_ARGS
from bidm_cli.packed.cpu.runtime.args import ARRIVALS, Source


@njit(inline="always", error_model="numpy")
def _load_six(at: Any, step: Any, lanes: Any) -> Any:
    """Six vectors ``step`` bytes apart."""
    return (
        load_floats(at, lanes),
        load_floats(at + step, lanes),
        load_floats(at + 2 * step, lanes),
        load_floats(at + 3 * step, lanes),
        load_floats(at + 4 * step, lanes),
        load_floats(at + 5 * step, lanes),
    )


@njit(inline="always", error_model="numpy")
def _store_six(at: Any, step: Any, six: Any) -> None:
    """Store six vectors ``step`` bytes apart."""
    store(at, six[0])
    store(at + step, six[1])
    store(at + 2 * step, six[2])
    store(at + 3 * step, six[3])
    store(at + 4 * step, six[4])
    store(at + 5 * step, six[5])


@njit(inline="always", error_model="numpy")
def _inputs(d: Any, lanes: Any) -> Any:
    """B^T d."""
    d0, d1, d2, d3, d4, d5 = d
    two, four, five = splat(float32(2), lanes), splat(float32(4), lanes), splat(float32(5), lanes)
    near, far, sides = d4 - four * d2, d4 - d2, d3 - four * d1
    slopes = two * (d3 - d1)
    first, last = four * d0 - five * d2 + d4, four * d1 - five * d3 + d5
    return first, near + sides, near - sides, far + slopes, far - slopes, last


@njit(inline="always", error_model="numpy")
def _outputs(m: Any, lanes: Any) -> Any:
    """A^T m."""
    m0, m1, m2, m3, m4, m5 = m
    two, four, eight = splat(float32(2), lanes), splat(float32(4), lanes), splat(float32(8), lanes)
    near, far, near_slope, far_slope = m1 + m2, m3 + m4, m1 - m2, m3 - m4
    last = near_slope + eight * far_slope + m5
    return m0 + near + far, near_slope + two * far_slope, near + four * far, last


@njit(inline="always", error_model="numpy")
def _filters(g0: Any, g1: Any, g2: Any, lanes: Any) -> Any:
    """G g."""
    fourth, half, sixth = (
        splat(float32(1 / 4), lanes),
        splat(float32(1 / 2), lanes),
        splat(float32(1 / 6), lanes),
    )
    zero = splat(float32(0), lanes)
    near, far, slope = (g0 + g2) * sixth, (g0 * fourth + g2) * sixth, g1 * sixth
    return g0 * fourth, zero - near - slope, slope - near, far + half * slope, far - half * slope, g2


@njit(inline="always", error_model="numpy")
def _transform_filter(g: Any, tap: Any, into: Any, point: Any, rows: Any, step: Any, lanes: Any) -> None:
    """Write G g G^T of filters ``tap`` bytes between their 9 weights; rows: scratch memory."""
    for j in range(3):
        at, down = g + j * tap, 3 * tap
        columns = _filters(
            load_floats(at, lanes), load_floats(at + down, lanes), load_floats(at + 2 * down, lanes), lanes
        )
        _store_six(rows + j * step, 3 * step, columns)
    for i in range(INPUTS):
        at = rows + 3 * i * step
        line = _filters(
            load_floats(at, lanes), load_floats(at + step, lanes), load_floats(at + 2 * step, lanes), lanes
        )
        _store_six(into + INPUTS * i * point, point, line)


def make_winograd_weights(lanes: int, tile_vectors: int) -> Source:
    """Make the kernel of G g G^T, for the panels of one form of :func:`multiply_tile`."""
    wide = lanes * tile_vectors
    tap_space, row_space = 4 * 9 * lanes * lanes, 4 * 3 * INPUTS * lanes

    def winograd_weights(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        taps, rows, step = stack_bytes(tap_space), stack_bytes(row_space), 4 * lanes
        blocks = args.channels // lanes
        items = args.out_channels // lanes * blocks
        item = first_item(pointer, items)
        while item < items:
            o = item // blocks * lanes
            first = (item - item // blocks * blocks) * lanes
            for k in range(9):
                g = args.weights + 4 * ((9 * o + k) * args.channels + first)
                transpose_tile(g, 36 * args.channels, lanes, lanes, taps + k * lanes * step, step, lanes)
            into = args.transformed + 4 * ((o // wide * args.channels + first) * wide + o % wide)
            for c in range(lanes):
                to = into + 4 * c * wide
                _transform_filter(taps + c * step, lanes * step, to, 4 * args.point, rows, step, lanes)
            item = next_item(pointer, items)

    return winograd_weights, WINOGRAD_WEIGHTS_ARGS


@njit(inline="always", error_model="numpy")
def _tile_place(args: Any, tile: Any) -> Any:
    """(image, top, left) of a tile of outputs."""
    across = (args.width + OUTPUTS - 1) // OUTPUTS
    down = (args.height + OUTPUTS - 1) // OUTPUTS
    line = tile // across
    image = line // down
    return image, OUTPUTS * (line - image * down), OUTPUTS * (tile - line * across)


@njit(inline="always", error_model="numpy")
def _pixel(args: Any, image: Any, y: Any, x: Any) -> Any:
    """Address of an input pixel."""
    if y < 0 or x < 0 or y >= args.height or x >= args.width:
        return args.zeros
    row = (image * (args.height // args.repeat) + y // args.repeat) * (args.width // args.repeat)
    return args.x + 4 * (row + x // args.repeat) * args.channels


@njit(inline="always", error_model="numpy")
def _transform_inputs(
    args: Any, tile: Any, into: Any, point: Any, pixels: Any, rows: Any, lanes: Any
) -> None:
    """Write B^T d B of a tile, ``point`` bytes between its 36 lines; pixels, rows: scratch memory."""
    image, top, left = _tile_place(args, tile)
    for i in range(INPUTS):
        for j in range(INPUTS):
            store_long(pixels + 8 * (INPUTS * i + j), _pixel(args, image, top + i - 1, left + j - 1))
    step = 4 * lanes
    for c in range(0, 4 * args.channels, step):
        for j in range(INPUTS):
            at, down = pixels + 8 * j, 8 * INPUTS
            column = (
                load_floats(load_long(at) + c, lanes),
                load_floats(load_long(at + down) + c, lanes),
                load_floats(load_long(at + 2 * down) + c, lanes),
                load_floats(load_long(at + 3 * down) + c, lanes),
                load_floats(load_long(at + 4 * down) + c, lanes),
                load_floats(load_long(at + 5 * down) + c, lanes),
            )
            _store_six(rows + j * step, INPUTS * step, _inputs(column, lanes))
        for i in range(INPUTS):
            line = _load_six(rows + INPUTS * i * step, step, lanes)
            _store_six(into + INPUTS * i * point + c, point, _inputs(line, lanes))


@njit(inline="always", error_model="numpy")
def _write_output(args: Any, pixel: Any, c: Any, value: Any, lanes: Any) -> None:
    """Store ``lanes`` channels of an output pixel, with bias and residual."""
    at = 4 * pixel * args.out_channels + c
    if args.bias:
        value = value + load_floats(args.bias + c, lanes)
    if args.residual:
        value = value + load_floats(args.residual + at, lanes)
    store(args.out + at, value)


@njit(inline="always", error_model="numpy")
def _transform_outputs(args: Any, tile: Any, products: Any, point: Any, rows: Any, lanes: Any) -> None:
    """Write A^T m A of a tile's products, ``point`` bytes between its 36 lines; rows: scratch memory."""
    image, top, left = _tile_place(args, tile)
    step, line = 4 * lanes, INPUTS * 4 * lanes
    for c in range(0, 4 * args.out_channels, step):
        for j in range(INPUTS):
            column = _load_six(products + j * point + c, INPUTS * point, lanes)
            y0, y1, y2, y3 = _outputs(column, lanes)
            to = rows + j * step
            store(to, y0)
            store(to + line, y1)
            store(to + 2 * line, y2)
            store(to + 3 * line, y3)
        for i in range(min(OUTPUTS, args.height - top)):
            y0, y1, y2, y3 = _outputs(_load_six(rows + i * line, step, lanes), lanes)
            pixel = (image * args.height + top + i) * args.width + left
            _write_output(args, pixel, c, y0, lanes)
            if left + 1 < args.width:
                _write_output(args, pixel + 1, c, y1, lanes)
            if left + 2 < args.width:
                _write_output(args, pixel + 2, c, y2, lanes)
            if left + 3 < args.width:
                _write_output(args, pixel + 3, c, y3, lanes)


def make_winograd(lanes: int, tile_rows: int, tile_vectors: int, tiles: int) -> Source:
    """Make the convolution for one form of :func:`multiply_tile` and so many tiles per item."""
    wide = lanes * tile_vectors
    pixel_space, row_space, pointer_space = 8 * POINTS, 4 * lanes * POINTS, 8 * tile_rows

    def winograd(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        pixels, rows, lines = stack_bytes(pixel_space), stack_bytes(row_space), stack_bytes(pointer_space)
        point, product = 4 * tiles * args.channels, 4 * tiles * args.out_channels
        thread = arrive(address_of(pointer) + ARRIVALS) * POINTS
        inputs, products = args.inputs + thread * point, args.products + thread * product
        across, down = (args.width + OUTPUTS - 1) // OUTPUTS, (args.height + OUTPUTS - 1) // OUTPUTS
        count = args.images * across * down
        items = (count + tiles - 1) // tiles
        item = first_item(pointer, items)
        while item < items:
            first = item * tiles
            here = min(tiles, count - first)
            for t in range(here):
                _transform_inputs(args, first + t, inputs + 4 * t * args.channels, point, pixels, rows, lanes)
            for k in range(POINTS):
                for o in range(0, args.out_channels, wide):
                    panel = args.weights + 4 * (k * args.point + o * args.channels)
                    for t in range(0, here, tile_rows):
                        left = inputs + k * point + 4 * t * args.channels
                        point_at(lines, left, 4 * args.channels, here - t, tile_rows)
                        into = products + k * product + 4 * (t * args.out_channels + o)
                        multiply_tile(
                            lines, panel, 4 * wide, args.channels, into, 4 * args.out_channels,
                            lanes, tile_rows, tile_vectors,
                        )  # fmt: skip
            for t in range(here):
                _transform_outputs(
                    args, first + t, products + 4 * t * args.out_channels, product, rows, lanes
                )
            item = next_item(pointer, items)

    return winograd, WINOGRAD_ARGS
