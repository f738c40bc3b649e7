"""Functions of float vectors: 2^x, SiLU, maxima."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types

from bidm_cli.packed.cpu.codegen.vector import FLOAT, INT32, emitted, function, reduced

# 2^f on [-1/2, 1/2], the polynomial through the Chebyshev nodes of degree 6; relative error 3e-9.
_POWERS = (1.0, 0.6931472067, 0.2402265092, 0.05550327227, 0.009618056678, 0.001340042818, 0.0001546144472)
_LOG2_E = 1.4426950408889634
_ROUNDER = 12582912.0
"""1.5 * 2^23: adding it to a float32 leaves the nearest whole number in the lowest bits."""


def _constant(value: float, lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(FLOAT, lanes), [value] * lanes)


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, fused where the machine can."""
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(function(builder, name, a.type, [a.type] * 3), [a, b, c])


def power_of_two(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x, relative error 1e-7, for x from -126 (below: about 1e-38) to 127."""
    lanes = x.type.count
    ints = ir.VectorType(INT32, lanes)
    low = _constant(-126.0, lanes)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    shifted = builder.fadd(x, _constant(_ROUNDER, lanes))
    fraction = builder.fsub(x, builder.fsub(shifted, _constant(_ROUNDER, lanes)))
    result = _constant(_POWERS[-1], lanes)
    for coefficient in reversed(_POWERS[:-1]):
        result = multiply_add(builder, result, fraction, _constant(coefficient, lanes))
    # The whole number goes straight into the exponent's bits.
    exponent = builder.shl(builder.bitcast(shifted, ints), ir.Constant(ints, [23] * lanes))
    return builder.bitcast(builder.add(builder.bitcast(result, ints), exponent), x.type)


exp2 = emitted(lambda vector: vector(vector))(power_of_two)
fused = emitted(lambda a, b, c: a(a, b, c))(multiply_add)


@emitted(lambda vector: vector(vector))
def silu(b: Any, x: Any) -> Any:
    """x / (1 + e^-x) of float lanes."""
    lanes = x.type.count
    exponent = b.fmul(x, _constant(-_LOG2_E, lanes))
    high = _constant(126.0, lanes)
    exponent = b.select(b.fcmp_ordered(">", exponent, high), high, exponent)
    return b.fdiv(x, b.fadd(power_of_two(b, exponent), _constant(1.0, lanes)))


def _larger(b: Any, x: Any, y: Any) -> Any:
    """The larger of each pair of float lanes."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


larger = emitted(lambda x, y: x(x, y))(_larger)


@emitted(lambda vector: types.float32(vector))
def largest(b: Any, vector: Any) -> Any:
    """The largest float lane."""
    return reduced(b, vector, functools.partial(_larger, b))
