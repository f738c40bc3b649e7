"""Counting by table: a byte of activations chooses tables in which the filters' half bytes are looked up.

A vector holds one byte of each of 32 filters. For four channels the differing bits of an activation's half
byte and all sixteen half bytes that a filter can have are a table of sixteen bytes, in which AVX2 looks up 32
filters at once (VPSHUFB; T-MAC, arXiv 2407.00088, multiplies so). On other machines, whose tiles do without,
plain operations do the same.

With two activation planes the activations' bytes hold a half byte of each plane, and an entry is
n_1 + 16 n_2: one look-up counts for both. Entries are added as they are, and once more moved down by four
bits, which is enough to separate the two sums as long as each is below 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
"""Low and high half bytes of 32 filters."""


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
    if instruction_set().startswith("avx"):
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


class _Counts:
    """Sums of a tile in bytes, an entry per window and vector of filters, emptied into the int32 counts."""

    def __init__(self, tile: RegisterTile, planes: int) -> None:
        b = self._builder = tile.builder
        self.filters, self.planes = tile.lanes * tile.tile_vectors, planes
        self.vectors = range(self.filters // OCTETS)
        self.entries = [(i, v) for i in range(tile.tile_pixels) for v in self.vectors]
        self.sums = [self._zeros() for _ in range(planes)]
        self._places = {(i, v): 4 * (planes * i * self.filters + OCTETS * v) for i, v in self.entries}
        self._counts = tile.counts
        for entry in self.entries:
            for plane in range(planes):
                b.store(_splat(_WIDE, 0), self._place(entry, plane)).align = 4

    def _zeros(self) -> Slots:
        made = {entry: cgutils.alloca_once(self._builder, _WHOLE) for entry in self.entries}
        for slot in made.values():
            self._builder.store(_splat(_WHOLE, 0), slot)
        return made

    def _place(self, entry: tuple[int, int], plane: int) -> ir.Value:
        at = self._places[entry] + 4 * plane * self.filters
        return pointer(self._builder, self._builder.add(self._counts, INT64(at)), _WIDE)

    def empty(self) -> None:
        """Add the sums to the counts and begin again at zero."""
        b = self._builder
        for entry in self.entries:
            slots = [sums[entry] for sums in self.sums]
            values = [b.load(slot) for slot in slots]
            for plane, value in enumerate(values if self.planes == 1 else _separated(b, *values)):
                place = self._place(entry, plane)
                before = b.load(place)
                before.align = 4
                b.store(b.add(before, b.zext(value, _WIDE)), place).align = 4
            for slot in slots:
                b.store(_splat(_WHOLE, 0), slot)


def _count(
    tile: RegisterTile, counts: _Counts, window: Callable[[int, ir.Value, list[Halves]], None]
) -> None:
    """Call ``window`` (number, address of activations, halves of the filters' bytes) for each window and each
    byte of the filters, to which a byte of activations per plane belongs."""
    b, planes = tile.builder, counts.planes
    with stretches(tile, _FULL) as (row, start, length):
        first = b.mul(b.add(b.mul(row, tile.words), start), INT64(4))
        weights = b.add(tile.weights, b.mul(first, INT64(counts.filters)))
        offset = b.add(b.mul(row, tile.pitch), b.mul(start, INT64(4 * planes)))
        windows = [b.add(begin, offset) for begin in tile.pixels]
        # Not unrolled: LLVM would reorder the additions and run out of registers.
        with cgutils.for_range(b, b.mul(length, INT64(4))) as step:
            at = b.add(weights, b.mul(step.index, INT64(counts.filters)))
            halves = [_halves(b, b.add(at, INT64(OCTETS * v))) for v in counts.vectors]
            for i, begin in enumerate(windows):
                window(i, b.add(begin, b.mul(step.index, INT64(planes))), halves)
        counts.empty()


def count_by_lookup(tile: RegisterTile) -> None:
    """Method "lookup"."""
    b, counts = tile.builder, _Counts(tile, 1)
    entries = [n for byte in range(256) for half in (byte & 15, byte >> 4) for n in _differing(half)]
    tables = _constants(b, "bidm_differing_bits", entries)

    def window(i: int, address: ir.Value, halves: list[Halves]) -> None:
        chosen = b.add(tables, _shifted_byte(b, address, 5))
        for h in range(2):
            table = _table(b, b.add(chosen, INT64(16 * h)))
            for v in counts.vectors:
                tile.add_to(counts.sums[0][i, v], _look_up(b, table, halves[v][h]))

    _count(tile, counts, window)


def count_pairs_by_lookup(tile: RegisterTile) -> None:
    """Method "pairs": two counts per window, of activations with a half byte of each plane in a byte."""
    b, counts = tile.builder, _Counts(tile, 2)
    pairs = [(_differing(byte & 15), _differing(byte >> 4)) for byte in range(256)]
    entries = [n + 16 * m for first, second in pairs for n, m in zip(first, second, strict=True)]
    tables = _constants(b, "bidm_differing_bits_of_pairs", entries)

    def window(i: int, address: ir.Value, halves: list[Halves]) -> None:
        chosen = [_table(b, b.add(tables, _shifted_byte(b, b.add(address, INT64(h)), 4))) for h in range(2)]
        for v in counts.vectors:
            found = b.add(*(_look_up(b, table, half) for table, half in zip(chosen, halves[v], strict=True)))
            tile.add_to(counts.sums[0][i, v], found)
            moved = b.lshr(b.bitcast(found, _PAIRS), _splat(_PAIRS, 4))
            tile.add_to(counts.sums[1][i, v], b.bitcast(moved, _WHOLE))

    _count(tile, counts, window)


def _separated(b: ir.IRBuilder, sums: ir.Value, moved: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(n_1, n_2) of bytes, from the sums modulo 256 of s = n_1 + 16 n_2, as they are and moved.

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
    both = [(lower_1, upper_1), (lower_2, upper_2)]
    first, second = (b.bitcast(b.or_(low, b.shl(high, eight)), _WHOLE) for low, high in both)
    return first, second
