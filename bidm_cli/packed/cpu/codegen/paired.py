"""Rows of words in pairs: the half bytes of two rows in turn, as the method "pairs" counts them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from bidm_cli.packed.cpu.codegen.vector import INT32, INT64, emitted, pointer, read

_WORDS = 4
"""Words that are paired at once."""

_OCTETS = 4 * _WORDS
_ROW = ir.VectorType(ir.IntType(8), _OCTETS)


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_ROW, [value] * _OCTETS)


def _paired(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Bytes of two vectors as twice as many: the lower halves of both, then the upper halves, in turn."""
    lower = b.or_(b.and_(first, _splat(15)), b.shl(second, _splat(4)))
    upper = b.or_(b.lshr(first, _splat(4)), b.and_(second, _splat(240)))
    order = [place for i in range(_OCTETS) for place in (i, _OCTETS + i)]
    return b.shuffle_vector(lower, upper, ir.Constant(ir.VectorType(INT32, 2 * _OCTETS), order))


@emitted(lambda first, second, words, into: types.void(*[types.int64] * 4))
def pair_rows(b: Any, first: Any, second: Any, words: Any, into: Any) -> None:
    """Write two rows of so many words in pairs, 8 bytes for a word of each; all but ``words`` are addresses.

    Byte i of these holds the half bytes number i, that of the first row in its lower bits.
    """
    wide = b.udiv(words, INT64(_WORDS))
    with cgutils.for_range(b, wide) as step:
        at = b.mul(step.index, INT64(_OCTETS))
        both = _paired(b, read(b, b.add(first, at), _ROW), read(b, b.add(second, at), _ROW))
        written = b.store(both, pointer(b, b.add(into, b.shl(at, INT64(1))), both.type))
        written.align = 4
    done = b.mul(wide, INT64(_WORDS))
    with cgutils.for_range(b, b.sub(words, done)) as step:
        at = b.mul(b.add(done, step.index), INT64(4))
        word = [_word(b, b.add(row, at)) for row in (first, second)]
        both = b.bitcast(_paired(b, *word), ir.VectorType(INT64, _OCTETS // 4))
        target = pointer(b, b.add(into, b.shl(at, INT64(1))), INT64)
        b.store(b.extract_element(both, INT32(0)), target).align = 4


def _word(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """A vector whose first bytes are the word at an address."""
    words = ir.Constant(ir.VectorType(INT32, _WORDS), None)
    return b.bitcast(b.insert_element(words, read(b, address, INT32), INT32(0)), _ROW)
