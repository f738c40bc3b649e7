"""Float32 numbers as sums of bfloat16 numbers, for a matrix unit that multiplies those.

    x = x_0 + x_1 + ...,    x_0 = bfloat16(x),  x_1 = bfloat16(x - x_0),  ...

Each part has 8 bits of x's significand: three parts are all of it, two leave an error of 2^-18.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.vector import FLOAT, INT32, INT64, function, pointer

PAIRS = 16
"""Lanes of a vector: pairs of bfloat16 numbers, or float32 numbers."""

_LOW_OR_HIGH = 0b11111000
"""Truth table of a | (b & c)."""

_WORDS = ir.VectorType(INT32, PAIRS)
_FLOATS = ir.VectorType(FLOAT, PAIRS)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * PAIRS)


def _rounded(b: ir.IRBuilder, x: ir.Value, any_nan: bool) -> ir.Value:
    """Bits of float lanes whose upper halves are bfloat16 numbers; the lower halves are of no meaning."""
    bits = b.bitcast(x, _WORDS)
    nearest = b.add(bits, _all(1 << 15))
    if not any_nan:
        return nearest
    # Rounding could turn a NaN into -0, and cutting it off into an infinity.
    return b.select(b.fcmp_unordered("uno", x, x), b.or_(bits, _all(1 << 22)), nearest)


def _joined(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Lower halves of words, the others zero there, and upper halves of others."""
    # As plain operations it would become a permutation of halves, which is slower.
    choose = function(b, "llvm.x86.avx512.pternlog.d.512", _WORDS, [_WORDS] * 3 + [INT32])
    return b.call(choose, [low, high, _all(-1 << 16), INT32(_LOW_OR_HIGH)])


def write_parts(
    b: ir.IRBuilder, pair: list[ir.Value], into: ir.Value, pitch: int, parts: int, any_nan: bool
) -> None:
    """Write the parts of two float vectors, ``pitch`` bytes apart, each a vector of pairs of bfloat16.

    ``any_nan``: the lower half of a NaN may have bits set, as it has not where a matrix unit made it.
    """
    for part in range(parts):
        bits = [_rounded(b, x, any_nan) for x in pair]
        upper = [b.and_(x, _all(-1 << 16)) for x in bits]
        word = _joined(b, b.lshr(bits[0], _all(16)), bits[1])
        at = pointer(b, b.add(into, INT64(pitch * part)), _WORDS)
        b.store(word, at).align = 4
        pair = [b.fsub(x, b.bitcast(up, _FLOATS)) for x, up in zip(pair, upper, strict=True)]


@intrinsic(prefer_literal=True)
def store_parts(typingctx: Any, first: Any, second: Any, into: Any, pitch: Any, parts: Any) -> Any:
    """Write the parts of two vectors of 16 float32 as pairs of bfloat16; ``pitch`` and ``parts`` literal."""

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        one, two, into, *_ = arguments
        write_parts(b, [one, two], into, pitch.literal_value, parts.literal_value, True)
        return context.get_dummy_value()

    return types.void(first, second, types.int64, pitch, parts), code
