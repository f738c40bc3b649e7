"""Products of signs on the matrix unit of recent x86 processors (AMX), by tiles of 8-bit numbers.

    sum over channels of x s,    x = 1 where an activation is positive, else 0;  s = 1 where a weight is
                                 negative, else -1

A tile has 16 rows of 64 bytes. Weights stay bits in memory, and become bytes a few tiles before they are
multiplied, in a ring of tiles that stays in the first-level cache; this runs beside the matrix unit.
"""

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from bidm_cli.packed.cpu.codegen.isa import MATRIX_DEPTH, MATRIX_PIXELS
from bidm_cli.packed.cpu.codegen.vector import INT64, emitted, function, pointer, read

TILE = MATRIX_PIXELS
"""Rows of a tile."""

DEPTH = MATRIX_DEPTH
"""Channels of a tile."""

_LEAD, _SLOTS = 2, 4
"""Steps by which weights become bytes before they are multiplied, and steps in the ring."""

TILE_BYTES = TILE * DEPTH
"""Bytes of a tile."""

RING_BYTES = 2 * _SLOTS * TILE_BYTES

MASK_BYTES = TILE * DEPTH // 8
"""Bytes of a tile of weights in bits."""

_BYTE, _VOID = ir.IntType(8), ir.VoidType()
_BYTES, _MASK = ir.VectorType(_BYTE, DEPTH), ir.VectorType(ir.IntType(1), DEPTH)


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_BYTES, [value] * DEPTH)


def operate_tiles(b: ir.IRBuilder, name: str, *tiles: int) -> None:
    """An instruction whose operands are tiles alone."""
    operation = function(b, f"llvm.x86.{name}", _VOID, [_BYTE] * len(tiles))
    b.call(operation, [ir.Constant(_BYTE, tile) for tile in tiles])


def move_tile(b: ir.IRBuilder, name: str, tile: int, address: ir.Value, pitch: ir.Value) -> None:
    """Load a tile from rows ``pitch`` bytes apart, or store it to them."""
    at = b.inttoptr(address, _BYTE.as_pointer())
    operation = function(b, f"llvm.x86.{name}", _VOID, [_BYTE, at.type, INT64])
    b.call(operation, [ir.Constant(_BYTE, tile), at, pitch])


@emitted(lambda: types.void())
def open_tiles(b: Any) -> None:
    """Turn the matrix unit on for this thread, with eight tiles of 16 rows of 64 bytes."""
    shapes = struct.pack("<BB14x8H16x8B8x", 1, 0, *[DEPTH] * 8, *[TILE] * 8)
    kind = ir.ArrayType(_BYTE, len(shapes))
    found = b.module.globals.get("bidm_tile_shapes")
    if found is None:
        found = ir.GlobalVariable(b.module, kind, "bidm_tile_shapes")
        found.linkage, found.global_constant, found.align = "internal", True, 64
        found.initializer = ir.Constant(kind, bytearray(shapes))
    at = b.bitcast(found, _BYTE.as_pointer())
    b.call(function(b, "llvm.x86.ldtilecfg", _VOID, [at.type]), [at])


@emitted(lambda: types.void())
def close_tiles(b: Any) -> None:
    """Turn the matrix unit off again."""
    b.call(function(b, "llvm.x86.tilerelease", _VOID, []), [])


@emitted(lambda *values: types.void(*[types.int64] * 11))
def multiply_signs(
    b: Any,
    upper: Any,
    lower: Any,
    pitch: Any,
    line_pitch: Any,
    step_pitch: Any,
    lines: Any,
    steps: Any,
    weights: Any,
    ring: Any,
    upper_sums: Any,
    lower_sums: Any,
) -> None:
    """Multiply two tiles of 16 windows by 32 filters.

    Args (int64):
        upper, lower: address of each tile's first window. pitch: bytes from a window to the next.
        line_pitch, step_pitch: bytes from a line of a window to the next, and in a line from one step of 64
            channels to the next. lines, steps: of a window, and of a line.
        weights: address of bits [lines, steps, 2, 16, 16, 4], the last three axes 4 channels, filters,
            channels.
        ring: address of ``RING_BYTES`` of scratch memory, 64-byte aligned.
        upper_sums, lower_sums: addresses of the results, int32 [16, 32].
    """
    last = b.sub(b.mul(lines, steps), INT64(1))

    def slot(step: ir.Value) -> ir.Value:
        return b.add(ring, b.mul(b.and_(step, INT64(_SLOTS - 1)), INT64(2 * TILE_BYTES)))

    def expand(step: ir.Value, quarter: int) -> None:
        """A quarter of the two tiles of weights of a step, or again of the last one."""
        step = b.select(b.icmp_signed("<", step, last), step, last)
        source, place = b.add(weights, b.mul(step, INT64(2 * MASK_BYTES))), slot(step)
        for row in range(TILE // 2 * quarter, TILE // 2 * (quarter + 1)):
            mask = b.bitcast(read(b, b.add(source, INT64(8 * row)), INT64), _MASK)
            signs = b.select(mask, _splat(-1), _splat(1))
            b.store(signs, pointer(b, b.add(place, INT64(DEPTH * row)), _BYTES)).align = DEPTH

    for tile in range(4):
        operate_tiles(b, "tilezero", tile)
    for first in range(_LEAD):
        for quarter in range(4):
            expand(INT64(first), quarter)
    with cgutils.for_range(b, lines) as line, cgutils.for_range(b, steps) as step:
        offset = b.add(b.mul(line.index, line_pitch), b.mul(step.index, step_pitch))
        number = b.add(b.mul(line.index, steps), step.index)
        here, row_pitch = slot(number), INT64(DEPTH)
        places = {4: (b.add(upper, offset), pitch), 5: (b.add(lower, offset), pitch)}
        places |= {6: (here, row_pitch), 7: (b.add(here, INT64(TILE_BYTES)), row_pitch)}
        for quarter, loaded in enumerate([(4, 6), (7,), (5,), ()]):
            for tile in loaded:
                move_tile(b, "tileloadd64", tile, *places[tile])
            operate_tiles(b, "tdpbssd", quarter, 4 + quarter // 2, 6 + quarter % 2)
            # Between the products, which the processor computes meanwhile.
            expand(b.add(number, INT64(_LEAD)), quarter)
    for tile in range(4):
        into = b.add(lower_sums if tile // 2 else upper_sums, INT64(4 * TILE * (tile % 2)))
        move_tile(b, "tilestored64", tile, into, INT64(8 * TILE))
