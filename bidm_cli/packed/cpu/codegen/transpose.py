"""Transpose of a square tile of floats in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.vector import FLOAT, INT32, INT64, pointer, read_first


@intrinsic(prefer_literal=True)
def transpose_tile(
    typingctx: Any,
    source: Any,
    pitch: Any,
    rows: Any,
    columns: Any,
    out: Any,
    out_pitch: Any,
    lanes: Any,
) -> Any:
    """Write the transpose of a ``lanes`` x ``lanes`` tile of float32.

    Args (int64 unless literal):
        source, pitch: address of the tile, rows ``pitch`` bytes apart.
        rows, columns: of the tile that exist, 1 to ``lanes``. Rows beyond are the last one repeated,
            columns beyond are zeros; neither is read.
        out, out_pitch: the result's address and pitch; all of it is written.
        lanes: literal.
    """
    size = lanes.literal_value
    kind = ir.VectorType(FLOAT, size)

    def interleaved(b: ir.IRBuilder, x: ir.Value, y: ir.Value, start: int) -> ir.Value:
        """x[start], y[start], x[start + 1], ... up to ``size`` lanes."""
        order = [start + i // 2 + (size if i % 2 else 0) for i in range(size)]
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT32, size), order))

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, pitch, rows, columns, out, out_pitch, _ = arguments
        lines = []
        last = b.sub(rows, INT64(1))
        for i in range(size):
            row = b.select(b.icmp_signed("<", INT64(i), last), INT64(i), last)
            lines.append(read_first(b, b.add(source, b.mul(row, pitch)), columns, kind))
        # After log2(size) rounds of interleaving rows i and i + size / 2, rows have become columns.
        done, half = 1, size // 2
        while done < size:
            pairs = [(lines[i], lines[i + half]) for i in range(half)]
            lines = [interleaved(b, x, y, start) for x, y in pairs for start in (0, half)]
            done *= 2
        for i, line in enumerate(lines):
            at = b.add(out, b.mul(out_pitch, INT64(i)))
            b.store(line, pointer(b, at, kind)).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, lanes), code
