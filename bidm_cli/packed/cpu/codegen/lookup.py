"""Counting by table: a byte of activations chooses tables in which the filters' half bytes are looked up.

A vector holds one byte of each of 32 filters. For four channels the differing bits of an activation's half
byte and all sixteen half bytes that a filter can have are a table of sixteen bytes, in which AVX2 looks up 32
filters at once (VPSHUFB; T-MAC, arXiv 2407.00088, multiplies so). On other machines, whose tiles do without,
plain operations do the same.

Of two windows at once (:mod:`bidm_cli.packed.cpu.codegen.paired`) the activations' bytes hold a half byte of
each, and an entry is n_1 + 16 n_2: one look-up counts for both. Entries are added as they are, and once more
moved down by four bits, which is enough to separate the two sums as long as each is below 256.
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


class _Sums:
    """Sums of a tile in bytes: a vector of 32 filters per entry, an entry per window and vector."""

    def __init__(self, tile: RegisterTile) -> None:
        self.tile, self.builder = tile, tile.builder
        self.filters = tile.lanes * tile.tile_vectors
        self.vectors = range(self.filters // OCTETS)
        self.entries = [(i, v) for i in range(tile.tile_pixels) for v in self.vectors]

    def zeros(self, kind: ir.Type = _WHOLE) -> Slots:
        """A zeroed variable per entry."""
        made = {entry: cgutils.alloca_once(self.builder, kind) for entry in self.entries}
        self.clear(made)
        return made

    def clear(self, slots: Slots) -> None:
        for slot in slots.values():
            self.builder.store(ir.Constant(slot.type.pointee, None), slot)

    def place(self, row: int, vector: int) -> ir.Value:
        """Pointer to the counts of a row (int32, of 32 filters)."""
        at = 4 * (row * self.filters + OCTETS * vector)
        return pointer(self.builder, self.builder.add(self.tile.counts, INT64(at)), _WIDE)


def _count(
    tile: RegisterTile,
    sums: _Sums,
    window: Callable[[int, ir.Value, list[Halves]], None],
    empty: Callable[[], None],
    together: int = 1,
) -> None:
    """Call ``window`` (number, address of activations, halves of filters) for each window and byte.

    ``together`` bytes of activations belong to each byte of the filters. ``empty`` is called before the sums
    overflow.
    """
    b = tile.builder
    with stretches(tile, _FULL) as (row, start, length):
        first = b.mul(b.add(b.mul(row, tile.words), start), INT64(4))
        weights = b.add(tile.weights, b.mul(first, INT64(sums.filters)))
        offset = b.add(b.mul(row, tile.pitch), b.mul(start, INT64(4 * together)))
        windows = [b.add(begin, offset) for begin in tile.pixels]
        # Not unrolled: LLVM would reorder the additions and run out of registers.
        with cgutils.for_range(b, b.mul(length, INT64(4))) as step:
            at = b.add(weights, b.mul(step.index, INT64(sums.filters)))
            halves = [_halves(b, b.add(at, INT64(OCTETS * v))) for v in sums.vectors]
            for i, begin in enumerate(windows):
                window(i, b.add(begin, b.mul(step.index, INT64(together))), halves)
        empty()


def count_by_lookup(tile: RegisterTile) -> None:
    """Method "lookup"."""
    b, sums = tile.builder, _Sums(tile)
    slots, places = sums.zeros(), {entry: sums.place(*entry) for entry in sums.entries}
    entries = [n for byte in range(256) for half in (byte & 15, byte >> 4) for n in _differing(half)]
    tables = _constants(b, "bidm_differing_bits", entries)
    for place in places.values():
        b.store(_splat(_WIDE, 0), place).align = 4

    def window(i: int, address: ir.Value, halves: list[Halves]) -> None:
        chosen = b.add(tables, _shifted_byte(b, address, 5))
        for h in range(2):
            table = _table(b, b.add(chosen, INT64(16 * h)))
            for v in sums.vectors:
                tile.add_to(slots[i, v], _look_up(b, table, halves[v][h]))

    def empty() -> None:
        for entry, place in places.items():
            before = b.load(place)
            before.align = 4
            b.store(b.add(before, b.zext(b.load(slots[entry]), _WIDE)), place).align = 4
        sums.clear(slots)

    _count(tile, sums, window, empty)


def count_pairs_by_lookup(tile: RegisterTile) -> None:
    """Method "pairs": two counts per entry, of windows with a half byte of each in a byte."""
    b, sums = tile.builder, _Sums(tile)
    slots = [sums.zeros() for _ in range(2)]
    # Of either window of a pair, the counts of filters at even and at odd places, in 16 bits.
    kept = [[sums.zeros(_PAIRS) for _ in range(2)] for _ in range(2)]
    pairs = [(_differing(byte & 15), _differing(byte >> 4)) for byte in range(256)]
    entries = [n + 16 * m for first, second in pairs for n, m in zip(first, second, strict=True)]
    tables = _constants(b, "bidm_differing_bits_of_pairs", entries)

    def window(i: int, address: ir.Value, halves: list[Halves]) -> None:
        chosen = [_table(b, b.add(tables, _shifted_byte(b, b.add(address, INT64(h)), 4))) for h in range(2)]
        for v in sums.vectors:
            found = b.add(*(_look_up(b, table, half) for table, half in zip(chosen, halves[v], strict=True)))
            tile.add_to(slots[0][i, v], found)
            moved = b.lshr(b.bitcast(found, _PAIRS), _splat(_PAIRS, 4))
            tile.add_to(slots[1][i, v], b.bitcast(moved, _WHOLE))

    def empty() -> None:
        for entry in sums.entries:
            found = _separated(b, *(b.load(of[entry]) for of in slots))
            for window_kept, counts in zip(kept, found, strict=True):
                for of, count in zip(window_kept, counts, strict=True):
                    tile.add_to(of[entry], count)
        for of in slots:
            sums.clear(of)

    _count(tile, sums, window, empty, together=2)
    order = ir.Constant(ir.VectorType(INT32, OCTETS), [16 * (i % 2) + i // 2 for i in range(OCTETS)])
    for i, v in sums.entries:
        for k, (even, odd) in enumerate(kept):
            count = b.shuffle_vector(b.load(even[i, v]), b.load(odd[i, v]), order)
            b.store(b.zext(count, _WIDE), sums.place(2 * i + k, v)).align = 4


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
