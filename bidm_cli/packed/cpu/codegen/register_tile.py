"""Tile of the inner loop as LLVM values: addresses, registers and loops that all ways of counting share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from llvmlite import ir
from numba.core import cgutils

from bidm_cli.packed.cpu.codegen.vector import INT32, INT64, function, pointer, read, spread

Slots = dict[tuple[int, int], ir.Value]
"""Variables of a tile by entry."""


class RegisterTile:
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


@contextlib.contextmanager
def stretches(tile: RegisterTile, most: int) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Loop over all runs in stretches of at most ``most`` words: (run, first word, words)."""
    b, limit = tile.builder, INT64(most)
    count = b.udiv(b.add(tile.words, INT64(most - 1)), limit)
    with cgutils.for_range(b, tile.rows) as row, cgutils.for_range(b, count) as stretch:
        start = b.mul(stretch.index, limit)
        left = b.sub(tile.words, start)
        yield row.index, start, b.select(b.icmp_signed("<", left, limit), left, limit)
