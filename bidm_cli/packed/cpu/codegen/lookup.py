"""Counting by table: bytes of activations choose tables in which the filters' half bytes are looked up.

A vector holds one byte of each of 32 filters. For four channels the differing bits of an activation's half
byte and all sixteen half bytes that a filter can have are a table of sixteen bytes, in which AVX2 looks up 32
filters at once (VPSHUFB; T-MAC, arXiv 2407.00088, multiplies so). On other machines, whose tiles do without,
plain operations do the same.

One look-up counts for two windows: a byte of theirs (:mod:`bidm_cli.packed.cpu.codegen.paired`) holds a half
byte of each, and an entry of the table is n_1 + 16 n_2. Entries are added as they are, and once more moved
down by four bits, which is enough to separate the two sums as long as each is below 256.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.packed.cpu.codegen.register_tile import RegisterTile, Slots, stretches
from bidm_cli.packed.cpu.codegen.vector import INT32, INT64, function, pointer, read, spread

OCTETS = 32
"""Filters per vector."""

_FULL = 7
"""Words whose counts fit a byte."""

_BYTE = ir.IntType(8)
_HALF, _WHOLE, _WIDE = ir.VectorType(_BYTE, 16), ir.VectorType(_BYTE, OCTETS), ir.VectorType(INT32, OCTETS)
_PAIRS = ir.VectorType(ir.IntType(16), OCTETS // 2)

Halves = tuple[ir.Value, ir.Value]
"""Low and high half bytes of 32 filters, or what belongs to bytes at even and at odd places."""


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _constants(builder: ir.IRBuilder, name: str, values: Sequence[int]) -> ir.Value:
    """Address of constant bytes, once per module."""
    found = builder.module.globals.get(name)
    if found is None:
        kind = ir.ArrayType(_BYTE, len(values))
        found = ir.GlobalVariable(builder.module, kind, name)
        found.linkage, found.global_constant, found.align = "internal", True, 32
        found.initializer = ir.Constant(kind, bytearray(values))
    return builder.ptrtoint(found, INT64)


def _differing(half: int) -> list[int]:
    """Bits in which a half byte differs from each of the sixteen."""
    return [(half ^ other).bit_count() for other in range(16)]


def _table(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The sixteen bytes at an address, in both halves of a vector."""
    table = builder.load(pointer(builder, address, _HALF))
    table.align = 16
    return builder.shuffle_vector(table, table, ir.Constant(ir.VectorType(INT32, OCTETS), [*range(16)] * 2))


def _look_up(b: ir.IRBuilder, table: ir.Value, halves: ir.Value) -> ir.Value:
    if instruction_set().startswith(("avx", "amx")):
        shuffle = function(b, "llvm.x86.avx2.pshuf.b", _WHOLE, [_WHOLE, _WHOLE])
        return b.call(shuffle, [table, halves])
    result: ir.Value = _splat(_WHOLE, 0)
    for i in range(16):
        entry = spread(b, b.extract_element(table, INT32(i)), OCTETS)
        result = b.select(b.icmp_unsigned("==", halves, _splat(_WHOLE, i)), entry, result)
    return result


def _halves(b: ir.IRBuilder, address: ir.Value) -> Halves:
    octets = read(b, address, _WHOLE)
    moved = b.bitcast(b.lshr(b.bitcast(octets, _PAIRS), _splat(_PAIRS, 4)), _WHOLE)
    return b.and_(octets, _splat(_WHOLE, 15)), b.and_(moved, _splat(_WHOLE, 15))


def _shifted_byte(b: ir.IRBuilder, address: ir.Value, shift: int) -> ir.Value:
    return b.shl(b.zext(b.load(pointer(b, address, _BYTE)), INT64), INT64(shift))


class _PairCounts:
    """Counts of a tile while they grow: an entry per pair of windows and vector of 32 filters.

    Attributes:
        sums: in bytes, of looked-up entries as they are, and moved. kept: of the first and of the second
            windows, those of filters at even and at odd places, in 16 bits.
    """

    def __init__(self, tile: RegisterTile) -> None:
        self.tile, self.builder = tile, tile.builder
        self.filters = tile.lanes * tile.tile_vectors
        self.vectors = range(self.filters // OCTETS)
        self.entries = [(i, v) for i in range(tile.tile_pixels) for v in self.vectors]
        self.sums = [self._zeros(_WHOLE) for _ in range(2)]
        self.kept = [[self._zeros(_PAIRS) for _ in range(2)] for _ in range(2)]
        pairs = [(_differing(byte & 15), _differing(byte >> 4)) for byte in range(256)]
        entries = [n + 16 * m for first, second in pairs for n, m in zip(first, second, strict=True)]
        self._tables = _constants(self.builder, "bidm_differing_bits", entries)

    def _zeros(self, kind: ir.Type) -> Slots:
        made = {entry: cgutils.alloca_once(self.builder, kind) for entry in self.entries}
        for slot in made.values():
            self.builder.store(ir.Constant(kind, None), slot)
        return made

    def add(self, pair: int, address: ir.Value, halves: list[Halves]) -> None:
        """Count a byte of each filter, with the two bytes of a pair of windows at ``address``."""
        b = self.builder
        offsets = [_shifted_byte(b, b.add(address, INT64(h)), 4) for h in range(2)]
        tables = [_table(b, b.add(self._tables, offset)) for offset in offsets]
        for v in self.vectors:
            found = b.add(*(_look_up(b, table, half) for table, half in zip(tables, halves[v], strict=True)))
            moved = b.lshr(b.bitcast(found, _PAIRS), _splat(_PAIRS, 4))
            self.tile.add_to(self.sums[0][pair, v], found)
            self.tile.add_to(self.sums[1][pair, v], b.bitcast(moved, _WHOLE))

    def keep(self) -> None:
        """Add the sums to what is kept, before they overflow, and begin again at zero."""
        b = self.builder
        for entry in self.entries:
            found = _separated(b, *(b.load(of[entry]) for of in self.sums))
            for kept, counts in zip(self.kept, found, strict=True):
                for of, count in zip(kept, counts, strict=True):
                    self.tile.add_to(of[entry], count)
            for of in self.sums:
                b.store(ir.Constant(_WHOLE, None), of[entry])

    def write(self) -> None:
        """Write what was kept as int32, in the filters' order."""
        b, order = self.builder, [16 * (i % 2) + i // 2 for i in range(OCTETS)]
        shuffle = ir.Constant(ir.VectorType(INT32, OCTETS), order)
        for pair, v in self.entries:
            for k, (even, odd) in enumerate(self.kept):
                count = b.shuffle_vector(b.load(even[pair, v]), b.load(odd[pair, v]), shuffle)
                at = INT64(4 * ((2 * pair + k) * self.filters + OCTETS * v))
                place = pointer(b, b.add(self.tile.counts, at), _WIDE)
                b.store(b.zext(count, _WIDE), place).align = 4


def count_pairs(tile: RegisterTile) -> None:
    """Method "pairs"."""
    b, counts = tile.builder, _PairCounts(tile)
    with stretches(tile, _FULL) as (row, start, length):
        first = b.mul(b.add(b.mul(row, tile.words), start), INT64(4))
        weights = b.add(tile.weights, b.mul(first, INT64(counts.filters)))
        offset = b.add(b.mul(row, tile.pitch), b.mul(start, INT64(8)))
        windows = [b.add(begin, offset) for begin in tile.pixels]
        # Not unrolled: LLVM would reorder the additions and run out of registers.
        with cgutils.for_range(b, b.mul(length, INT64(4))) as step:
            at = b.add(weights, b.mul(step.index, INT64(counts.filters)))
            halves = [_halves(b, b.add(at, INT64(OCTETS * v))) for v in counts.vectors]
            for pair, begin in enumerate(windows):
                counts.add(pair, b.add(begin, b.mul(step.index, INT64(2))), halves)
        counts.keep()
    counts.write()


def _separated(b: ir.IRBuilder, sums: ir.Value, moved: ir.Value) -> tuple[Halves, Halves]:
    """n_1 and n_2, of bytes at even and at odd places, from sums modulo 256 of s = n_1 + 16 n_2, as they are
    and moved.

    Two bytes move together by 4 bits: the upper one to its n_2, the lower one to its n_2 + 16 times the
    upper's n_1.
    """
    eight, full = _splat(_PAIRS, 8), _splat(_PAIRS, 255)
    sums, moved = b.bitcast(sums, _PAIRS), b.bitcast(moved, _PAIRS)

    def less(a: ir.Value, other: ir.Value) -> ir.Value:
        return b.and_(b.sub(a, b.shl(other, _splat(_PAIRS, 4))), full)

    upper_2 = b.lshr(moved, eight)
    upper_1 = less(b.lshr(sums, eight), upper_2)
    lower_2 = less(moved, upper_1)
    lower_1 = less(sums, lower_2)
    return (lower_1, upper_1), (lower_2, upper_2)
