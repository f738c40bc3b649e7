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

from bidm_cli.packed.cpu.codegen.vector import INT64, emitted, function, pointer, read

TILE = 16
"""Rows of a tile."""

DEPTH = 64
"""Channels of a tile."""

_AHEAD, _SLOTS = 2, 4
"""Steps by which weights become bytes before they are multiplied, and steps in the ring."""

TILE_BYTES = TILE * DEPTH
"""Bytes of a tile."""

RING_BYTES = 2 * _SLOTS * TILE_BYTES

MASK_BYTES = TILE * DEPTH // 8
"""Bytes of a tile of weights in bits."""

_BYTE, _VOID = ir.IntType(8), ir.VoidType()
_BYTES = ir.VectorType(_BYTE, DEPTH)
_HALF = ir.VectorType(_BYTE, DEPTH // 2)


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


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


@emitted(lambda word, into: types.void(types.int64, types.int64))
def spread_word(b: Any, word: Any, into: Any) -> None:
    """Write the 32 bits at the address ``word`` as bytes 0 and 1."""
    _spread(b, word, into, _HALF)


@emitted(lambda words, into: types.void(types.int64, types.int64))
def spread_words(b: Any, words: Any, into: Any) -> None:
    """The same with 64 bits."""
    _spread(b, words, into, _BYTES)


def _spread(b: ir.IRBuilder, address: ir.Value, into: ir.Value, kind: ir.VectorType) -> None:
    b.store(b.zext(_mask(b, address, kind), kind), pointer(b, into, kind)).align = 4


def _mask(b: ir.IRBuilder, address: ir.Value, kind: ir.VectorType) -> ir.Value:
    """As many bits as a vector has lanes."""
    bits = read(b, address, ir.IntType(kind.count))
    return b.bitcast(bits, ir.VectorType(ir.IntType(1), kind.count))


@emitted(lambda into: types.void(types.int64))
def clear_word(b: Any, into: Any) -> None:
    """Write 32 zero bytes."""
    b.store(ir.Constant(_HALF, None), pointer(b, into, _HALF)).align = 4


@emitted(lambda rows, weights, depth, ring, sums, width, goes_on: types.void(*[types.int64] * 7))
def multiply_signs(
    b: Any, rows: Any, weights: Any, depth: Any, ring: Any, sums: Any, width: Any, goes_on: Any
) -> None:
    """Multiply 32 rows by 32 filters.

    Args (int64):
        rows: address of x, bytes [depth, 32, 64].
        weights: address of bits [depth, 2, 16, 16, 4], the last three axes 4 channels, filters, channels.
        depth: steps of 64 channels.
        ring: address of ``RING_BYTES`` of scratch memory, 64-byte aligned.
        sums: address of the result, int32 [32, 32], rows ``width`` bytes apart.
        goes_on: 0, or 1 to add to the sums that are there.
    """
    last, line = b.sub(depth, INT64(1)), INT64(DEPTH)

    def slot(step: ir.Value) -> ir.Value:
        return b.add(ring, b.mul(b.and_(step, INT64(_SLOTS - 1)), INT64(2 * TILE_BYTES)))

    def expand(step: ir.Value) -> None:
        step = b.select(b.icmp_signed("<", step, last), step, last)
        source, place = b.add(weights, b.mul(step, INT64(2 * MASK_BYTES))), slot(step)
        for row in range(2 * TILE):
            mask = _mask(b, b.add(source, INT64(8 * row)), _BYTES)
            signs = b.select(mask, _splat(_BYTES, -1), _splat(_BYTES, 1))
            b.store(signs, pointer(b, b.add(place, INT64(DEPTH * row)), _BYTES)).align = DEPTH

    results = []
    for tile in range(4):
        down, right = divmod(tile, 2)
        results.append(b.add(sums, b.add(b.mul(width, INT64(TILE * down)), INT64(4 * TILE * right))))
    with b.if_else(b.icmp_signed("!=", goes_on, INT64(0))) as (then, otherwise):
        with then:
            for tile, result in enumerate(results):
                move_tile(b, "tileloadd64", tile, result, width)
        with otherwise:
            for tile in range(4):
                operate_tiles(b, "tilezero", tile)
    for step in range(_AHEAD):
        expand(INT64(step))
    with cgutils.for_range(b, depth) as step:
        row = b.add(rows, b.mul(step.index, INT64(2 * TILE_BYTES)))
        move_tile(b, "tileloadd64", 4, row, line)
        move_tile(b, "tileloadd64", 6, slot(step.index), line)
        operate_tiles(b, "tdpbssd", 0, 4, 6)
        move_tile(b, "tileloadd64", 7, b.add(slot(step.index), INT64(TILE_BYTES)), line)
        operate_tiles(b, "tdpbssd", 1, 4, 7)
        move_tile(b, "tileloadd64", 5, b.add(row, INT64(TILE_BYTES)), line)
        operate_tiles(b, "tdpbssd", 2, 5, 6)
        operate_tiles(b, "tdpbssd", 3, 5, 7)
        expand(b.add(step.index, INT64(_AHEAD)))
    for tile, result in enumerate(results):
        move_tile(b, "tilestored64", tile, result, width)
