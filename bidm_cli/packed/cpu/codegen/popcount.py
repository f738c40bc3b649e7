"""Inner loop of binary products: popcount(pixel xor filter) for a tile of pixels x filters in registers.

Lanes are filters: each 32-bit lane of a vector holds a word of another filter, a pixel's word is spread over
all lanes, and the counts end up as int32 in the order of the epilogue. Three methods, by the machine's
instructions:

    direct       popcount of 32-bit lanes, added up (AVX-512 VPOPCNTDQ: one instruction)
    bytes        popcount of bytes (NEON: one instruction; AVX2: a nibble table), added up in bytes that are
                 emptied into the lanes before they overflow
    carry_save   eight words go through full adders made of logic (Harley-Seal), and only every eighth needs
                 a popcount of bytes (AVX2, AVX-512 without VPOPCNTDQ)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.vector import INT32, INT64, function, pointer, read, spread

METHODS = ("direct", "bytes", "carry_save")
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
        counts: address of the result, int32 [tile_pixels, tile_vectors * lanes].
        method, lanes, tile_pixels, tile_vectors: literals.
    """
    shape = (lanes.literal_value, tile_pixels.literal_value, tile_vectors.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = _Tile(builder, *shape, arguments[:6])
        {"direct": _direct, "bytes": _bytes, "carry_save": _carry_save}[method.literal_value](tile)
        return context.get_dummy_value()

    numbers = [types.int64] * 6
    return types.void(*numbers, method, lanes, tile_pixels, tile_vectors), code


Slots = dict[tuple[int, int], ir.Value]
"""Variables of a tile by entry."""


class _Tile:
    """IR values of one tile, an entry per pixel and vector of filters, and what all methods share."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        lanes: int,
        tile_pixels: int,
        tile_vectors: int,
        values: Sequence[ir.Value],
    ) -> None:
        pixels, self.weights, self.rows, self.words, self.pitch, self.counts = values
        self.builder, self.lanes = builder, lanes
        self.entries = [(i, v) for i in range(tile_pixels) for v in range(tile_vectors)]
        self.tile_pixels, self.tile_vectors = tile_pixels, tile_vectors
        self.ints = ir.VectorType(INT32, lanes)
        self.octets = ir.VectorType(ir.IntType(8), 4 * lanes)
        self.pixels = [
            builder.load(pointer(builder, builder.add(pixels, INT64(8 * i)), INT64))
            for i in range(tile_pixels)
        ]

    def registers(self, kind: ir.Type) -> Slots:
        """One zeroed variable per entry; LLVM keeps them in registers."""
        made = {entry: cgutils.alloca_once(self.builder, kind) for entry in self.entries}
        for slot in made.values():
            self.builder.store(ir.Constant(kind, None), slot)
        return made

    def add_to(self, slot: ir.Value, value: ir.Value) -> None:
        self.builder.store(self.builder.add(self.builder.load(slot), value), slot)

    def differences(self, row: ir.Value, word: ir.Value) -> Callable[[int, int], ir.Value]:
        """Function (pixel, vector of filters) -> xor of their words number ``word`` in kernel row ``row``."""
        b, width = self.builder, 4 * self.lanes
        k = b.add(b.mul(row, self.words), word)
        at = b.add(self.weights, b.mul(k, INT64(width * self.tile_vectors)))
        filters = [read(b, b.add(at, INT64(width * v)), self.ints) for v in range(self.tile_vectors)]
        offset = b.add(b.mul(row, self.pitch), b.mul(word, INT64(4)))
        words = [spread(b, read(b, b.add(start, offset), INT32), self.lanes) for start in self.pixels]
        return lambda i, v: b.xor(words[i], filters[v])

    def popcount(self, value: ir.Value, kind: ir.Type) -> ir.Value:
        name = f"llvm.ctpop.v{kind.count}i{kind.element.width}"
        count = function(self.builder, name, kind, [kind])
        return self.builder.call(count, [self.builder.bitcast(value, kind)])

    def sum_of_octets(self, value: ir.Value) -> ir.Value:
        """The four bytes of every lane added up (they sum to less than 2^16)."""
        b = self.builder

        def constant(number: int) -> ir.Value:
            return ir.Constant(self.ints, [number] * self.lanes)

        value = b.bitcast(value, self.ints)
        pairs = b.add(
            b.and_(value, constant(0x00FF00FF)),
            b.and_(b.lshr(value, constant(8)), constant(0x00FF00FF)),
        )
        return b.add(b.and_(pairs, constant(0xFFFF)), b.lshr(pairs, constant(16)))

    def write(self, totals: Slots) -> None:
        b, width = self.builder, 4 * self.lanes
        for (i, v), slot in totals.items():
            at = b.add(self.counts, INT64(width * (i * self.tile_vectors + v)))
            written = b.store(b.load(slot), pointer(b, at, self.ints))
            written.align = 4


def _direct(tile: _Tile) -> None:
    b, totals = tile.builder, tile.registers(tile.ints)
    with cgutils.for_range(b, tile.rows) as row, cgutils.for_range(b, tile.words) as word:
        difference = tile.differences(row.index, word.index)
        for entry in tile.entries:
            tile.add_to(totals[entry], tile.popcount(difference(*entry), tile.ints))
    tile.write(totals)


@contextlib.contextmanager
def _stretches(tile: _Tile, most: int) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Loop over all runs in stretches of at most ``most`` words: (run, first word, words)."""
    b, limit = tile.builder, INT64(most)
    count = b.udiv(b.add(tile.words, INT64(most - 1)), limit)
    with cgutils.for_range(b, tile.rows) as row, cgutils.for_range(b, count) as stretch:
        start = b.mul(stretch.index, limit)
        left = b.sub(tile.words, start)
        yield row.index, start, b.select(b.icmp_signed("<", left, limit), left, limit)


def _count_bytes(tile: _Tile, row: ir.Value, start: ir.Value, length: ir.Value, octets: Slots) -> None:
    """Add the popcounts of a stretch, byte by byte."""
    b = tile.builder
    with cgutils.for_range(b, length) as step:
        difference = tile.differences(row, b.add(start, step.index))
        for entry in tile.entries:
            tile.add_to(octets[entry], tile.popcount(difference(*entry), tile.octets))


def _bytes(tile: _Tile) -> None:
    b, totals = tile.builder, tile.registers(tile.ints)
    octets = tile.registers(tile.octets)
    with _stretches(tile, _BYTES_FULL) as (row, start, length):
        _count_bytes(tile, row, start, length, octets)
        for entry in tile.entries:
            tile.add_to(totals[entry], tile.sum_of_octets(b.load(octets[entry])))
            b.store(ir.Constant(tile.octets, None), octets[entry])
    tile.write(totals)


def _carry_save(tile: _Tile) -> None:
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

    with _stretches(tile, 8 * _BYTES_FULL) as (row, start, length):
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


def _eight_words(tile: _Tile, row: ir.Value, first: ir.Value, kept: list[Slots], octets: Slots) -> None:
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
