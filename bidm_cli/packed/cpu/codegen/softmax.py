"""Softmax of columns of scores in blocks of 32 x 32, on AVX-512: maxima, powers of two, weights as bfloat16.

Lanes are columns (queries), rows are keys, so that nothing has to be combined across lanes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.amx_floats import PART_BYTES, ROW_BYTES, SIDE, Step, product_steps
from bidm_cli.packed.cpu.codegen.bfloat import PAIRS, write_parts
from bidm_cli.packed.cpu.codegen.vector import FLOAT, INT32, INT64, emitted, function, pointer, read
from bidm_cli.packed.cpu.codegen.vector_math import multiply_add

SLACK = 8.0
"""How far scores may be above the top that is taken from them, in powers of two."""

PAIRS_AT_ONCE = 8
"""Pairs of keys that are weighed at once."""

_FLOATS = ir.VectorType(FLOAT, PAIRS)
_VECTOR_BYTES = 4 * PAIRS
_COLUMNS = SIDE // PAIRS

# 2^f on [0, 1], relative error 8e-8: least squares with weights raised where the error is largest (Lawson).
_POWERS = (1.0, 0.6931513118, 0.2401644502, 0.0557999131, 0.00901703032, 0.00186713007)
_ALL_LANES, _FLOOR, _AS_SET = ir.Constant(ir.IntType(16), -1), INT32(1), INT32(4)


def power(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x of 16 float lanes, relative error 1e-7, 0 for -inf and NaN for NaN."""
    mask = _ALL_LANES.type
    reduce = function(
        b, "llvm.x86.avx512.mask.reduce.ps.512", _FLOATS, [_FLOATS, INT32, _FLOATS, mask, INT32]
    )
    scale = function(
        b, "llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, [_FLOATS, _FLOATS, _FLOATS, mask, INT32]
    )
    fraction = b.call(reduce, [x, _FLOOR, x, _ALL_LANES, _AS_SET])
    result: ir.Value = ir.Constant(_FLOATS, [_POWERS[-1]] * PAIRS)
    for coefficient in reversed(_POWERS[:-1]):
        result = multiply_add(b, result, fraction, ir.Constant(_FLOATS, [coefficient] * PAIRS))
    return b.call(scale, [result, x, result, _ALL_LANES, _AS_SET])


power_of_two = emitted(lambda x: x(x))(power)


@emitted(lambda found, top: top(found, top))
def raised(b: Any, found: Any, top: Any) -> Any:
    """The maxima found, where they are above the top by more than ``SLACK``, else the top."""
    limit = b.fadd(top, ir.Constant(_FLOATS, [SLACK] * PAIRS))
    return b.select(b.fcmp_ordered(">", found, limit), found, top)


@emitted(lambda scores, rows, tops: types.void(*[types.int64] * 3))
def column_maxima(b: Any, scores: Any, rows: Any, tops: Any) -> None:
    """Write the maxima of 32 columns, of ``rows`` rows, a multiple of 4; NaN may be passed over."""
    lowest = ir.Constant(_FLOATS, [float("-inf")] * PAIRS)
    slots = [cgutils.alloca_once(b, _FLOATS) for _ in range(4 * _COLUMNS)]
    for slot in slots:
        b.store(lowest, slot)

    def larger(x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    with cgutils.for_range(b, b.sdiv(rows, INT64(4))) as step:
        line = b.add(scores, b.mul(step.index, INT64(4 * ROW_BYTES)))
        for i, slot in enumerate(slots):
            at = b.add(line, INT64(_VECTOR_BYTES * i))
            b.store(larger(read(b, at, _FLOATS), b.load(slot)), slot)
    for column in range(_COLUMNS):
        top, *others = (b.load(slot) for slot in slots[column::_COLUMNS])
        for other in others:
            top = larger(top, other)
        b.store(top, pointer(b, b.add(tops, INT64(_VECTOR_BYTES * column)), _FLOATS)).align = 4


def _weigh(
    b: ir.IRBuilder,
    places: tuple[ir.Value, ...],
    parts: int,
    beside: list[Step],
) -> None:
    """Emit :func:`weigh` with the steps of something else in between."""
    scores, tops, sums, into = places
    units = [(pair, column) for pair in range(PAIRS_AT_ONCE) for column in range(_COLUMNS)]
    for i, (pair, column) in enumerate(units):
        for step in beside[i * len(beside) // len(units) : (i + 1) * len(beside) // len(units)]:
            step()
        offset = INT64(_VECTOR_BYTES * column)
        top = read(b, b.add(tops, offset), _FLOATS)
        first = b.add(scores, b.add(offset, INT64(pair * ROW_BYTES)))
        rows = (first, b.add(first, INT64(PAIRS * ROW_BYTES)))
        weights = [power(b, b.fsub(read(b, row, _FLOATS), top)) for row in rows]
        place = b.add(into, INT64(PART_BYTES // 2 * column + _VECTOR_BYTES * pair))
        write_parts(b, weights, place, PART_BYTES, parts, False)
        at = b.add(sums, offset)
        total = b.fadd(read(b, at, _FLOATS), b.fadd(*weights))
        b.store(total, pointer(b, at, _FLOATS)).align = 4


@intrinsic(prefer_literal=True)
def weigh(typingctx: Any, scores: Any, tops: Any, sums: Any, into: Any, parts: Any) -> Any:
    """Write 2^(score - top) of some keys as part of the right panel of a product, and add it to the sums.

    Args (int64 unless literal):
        scores: address of the keys' scores, float32 [32 columns] each: keys i to i + ``PAIRS_AT_ONCE`` - 1
            of the first half of 32 keys, and, 16 rows further on, as many of the second half.
        tops, sums: addresses, float32 [32 columns].
        into: address of the panel at the pair i, bfloat16 [parts, 2, 16 pairs, 16 columns, 2].
        parts: literal.
    """

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        _weigh(b, arguments[:4], parts.literal_value, [])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, parts), code


@intrinsic(prefer_literal=True)
def weigh_and_multiply(
    typingctx: Any, scores: Any, tops: Any, sums: Any, into: Any, left: Any, right: Any, parts: Any
) -> Any:
    """:func:`weigh`, and :func:`add_product` beside it: the matrix unit works at the same time."""

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        left, right = arguments[4:6]
        _weigh(b, arguments[:4], parts.literal_value, product_steps(b, left, right, parts.literal_value))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, parts), code
