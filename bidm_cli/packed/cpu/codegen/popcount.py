"""Inner loop of binary products: popcount(pixel xor filter) for a tile of pixels x filters in registers.

Lanes are filters: each 32-bit lane of a vector holds a word of another filter, a pixel's word is spread over
all lanes, and the counts end up as int32 in the order of the epilogue. Methods, by the machine's
instructions:

    direct       popcount of 32-bit lanes, added up (AVX-512 VPOPCNTDQ: one instruction)
    bytes        popcount of bytes (NEON: one instruction; AVX2: a nibble table), added up in bytes that are
                 emptied into the lanes before they overflow
    carry_save   eight words go through full adders made of logic (Harley-Seal), and only every eighth needs
                 a popcount of bytes (AVX2, AVX-512 without VPOPCNTDQ)
    pairs        bytes of 32 filters in a vector, and a byte with half bytes of two pixels' windows chooses
                 the table (AVX2; :mod:`bidm_cli.packed.cpu.codegen.lookup`)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.lookup import count_pairs
from bidm_cli.packed.cpu.codegen.register_tile import RegisterTile, Slots, stretches
from bidm_cli.packed.cpu.codegen.vector import INT64

_BYTES_FULL = 31
"""Additions of at most 8 that a byte takes before it could overflow."""


@intrinsic(prefer_literal=True)
def count_tile(
    typingctx: Any,
    pixels: Any,
    weights: Any,
    rows: Any,
    words: Any,
    pitch: Any,
    counts: Any,
    method: Any,
    lanes: Any,
    tile_pixels: Any,
    tile_vectors: Any,
) -> Any:
    """Count differing bits of ``tile_pixels`` pixels and ``tile_vectors * lanes`` filters.

    Args (int64 unless literal):
        pixels: address of ``tile_pixels`` addresses, where each pixel's window of words starts.
        weights: address of int32 [rows * words, tile_vectors * lanes].
        rows, words, pitch: a window is ``rows`` runs of ``words`` words, ``pitch`` bytes apart.
        counts: address of the result, int32 [tile_pixels, tile_vectors * lanes]; with the method "pairs"
            [tile_pixels, 2, tile_vectors * lanes], for ``tile_pixels`` pairs of pixels whose words are paired
            (:mod:`bidm_cli.packed.cpu.codegen.paired`).
        method, lanes, tile_pixels, tile_vectors: literals.
    """
    shape = (lanes.literal_value, tile_pixels.literal_value, tile_vectors.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = RegisterTile(builder, *shape, arguments[:6])
        METHODS[method.literal_value](tile)
        return context.get_dummy_value()

    numbers = [types.int64] * 6
    return types.void(*numbers, method, lanes, tile_pixels, tile_vectors), code


def _direct(tile: RegisterTile) -> None:
    b, totals = tile.builder, tile.registers(tile.ints)
    with cgutils.for_range(b, tile.rows) as row, cgutils.for_range(b, tile.words) as word:
        difference = tile.differences(row.index, word.index)
        for entry in tile.entries:
            tile.add_to(totals[entry], tile.popcount(difference(*entry), tile.ints))
    tile.write(totals)


def _count_bytes(tile: RegisterTile, row: ir.Value, start: ir.Value, length: ir.Value, octets: Slots) -> None:
    """Add the popcounts of a stretch, byte by byte."""
    b = tile.builder
    with cgutils.for_range(b, length) as step:
        difference = tile.differences(row, b.add(start, step.index))
        for entry in tile.entries:
            tile.add_to(octets[entry], tile.popcount(difference(*entry), tile.octets))


def _bytes(tile: RegisterTile) -> None:
    b, totals = tile.builder, tile.registers(tile.ints)
    octets = tile.registers(tile.octets)
    with stretches(tile, _BYTES_FULL) as (row, start, length):
        _count_bytes(tile, row, start, length, octets)
        for entry in tile.entries:
            tile.add_to(totals[entry], tile.sum_of_octets(b.load(octets[entry])))
            b.store(ir.Constant(tile.octets, None), octets[entry])
    tile.write(totals)


def _carry_save(tile: RegisterTile) -> None:
    """Binary counters over whole vectors: ones, twos and fours are kept, eights are counted."""
    b, totals = tile.builder, tile.registers(tile.ints)
    kept = [tile.registers(tile.ints) for _ in range(3)]
    octets = tile.registers(tile.octets)

    def empty(weight: int, values: Slots) -> None:
        shift = ir.Constant(tile.ints, [weight] * tile.lanes)
        for entry in tile.entries:
            counted = tile.sum_of_octets(b.load(values[entry]))
            tile.add_to(totals[entry], b.shl(counted, shift))
            b.store(ir.Constant(tile.octets, None), values[entry])

    with stretches(tile, 8 * _BYTES_FULL) as (row, start, length):
        groups = b.udiv(length, INT64(8))
        with cgutils.for_range(b, groups) as group:
            first = b.add(start, b.mul(group.index, INT64(8)))
            _eight_words(tile, row, first, kept, octets)
        empty(3, octets)
        done = b.mul(groups, INT64(8))
        _count_bytes(tile, row, b.add(start, done), b.sub(length, done), octets)
        empty(0, octets)
    for weight, values in enumerate(kept):
        for entry in tile.entries:
            b.store(tile.popcount(b.load(values[entry]), tile.octets), octets[entry])
        empty(weight, octets)
    tile.write(totals)


def _eight_words(
    tile: RegisterTile, row: ir.Value, first: ir.Value, kept: list[Slots], octets: Slots
) -> None:
    b = tile.builder
    steps = [tile.differences(row, b.add(first, INT64(q))) for q in range(8)]

    def add(x: ir.Value, y: ir.Value, z: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A full adder in every bit: (carry, sum)."""
        either = b.xor(x, y)
        return b.or_(b.and_(x, y), b.and_(either, z)), b.xor(either, z)

    for entry in tile.entries:
        ones, twos, fours = (b.load(values[entry]) for values in kept)
        fours_in = []
        for half in (0, 4):
            twos_a, ones = add(ones, steps[half](*entry), steps[half + 1](*entry))
            twos_b, ones = add(ones, steps[half + 2](*entry), steps[half + 3](*entry))
            four, twos = add(twos, twos_a, twos_b)
            fours_in.append(four)
        eights, fours = add(fours, *fours_in)
        for values, value in zip(kept, (ones, twos, fours), strict=True):
            b.store(value, values[entry])
        tile.add_to(octets[entry], tile.popcount(eights, tile.octets))


METHODS = {
    "direct": _direct,
    "bytes": _bytes,
    "carry_save": _carry_save,
    "pairs": count_pairs,
}
