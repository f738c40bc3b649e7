"""Float matrix product on a tile in registers, for attention.

    out[i, j] = sum over k of left[i, k] * right[k, j]      i < tile_rows, j < tile_vectors * lanes

Lanes are columns of ``right``; each element of ``left`` is spread over all lanes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.vector import FLOAT, INT64, pointer, read, spread
from bidm_cli.packed.cpu.codegen.vector_math import multiply_add


@intrinsic(prefer_literal=True)
def multiply_tile(
    typingctx: Any,
    left: Any,
    right: Any,
    pitch: Any,
    depth: Any,
    out: Any,
    out_pitch: Any,
    lanes: Any,
    tile_rows: Any,
    tile_vectors: Any,
) -> Any:
    """Multiply ``tile_rows`` rows by ``tile_vectors * lanes`` columns.

    Args (int64 unless literal):
        left: address of ``tile_rows`` addresses, each of a row of ``depth`` float32.
        right: address of the first column, rows ``pitch`` bytes apart.
        out: address of the result, rows ``out_pitch`` bytes apart.
        lanes, tile_rows, tile_vectors: literals.
    """
    width = lanes.literal_value
    rows, vectors = range(tile_rows.literal_value), range(tile_vectors.literal_value)
    kind = ir.VectorType(FLOAT, width)

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        left, right, pitch, depth, out, out_pitch, *_ = arguments
        starts = [b.load(pointer(b, b.add(left, INT64(8 * i)), INT64)) for i in rows]
        sums = {(i, v): cgutils.alloca_once(b, kind) for i in rows for v in vectors}
        for slot in sums.values():
            b.store(ir.Constant(kind, None), slot)
        with cgutils.for_range(b, depth) as step:
            at = b.add(right, b.mul(step.index, pitch))
            columns = [read(b, b.add(at, INT64(4 * width * v)), kind) for v in vectors]
            offset = b.mul(step.index, INT64(4))
            for i in rows:
                factor = spread(b, read(b, b.add(starts[i], offset), FLOAT), width)
                for v in vectors:
                    b.store(multiply_add(b, factor, columns[v], b.load(sums[i, v])), sums[i, v])
        for (i, v), slot in sums.items():
            at = b.add(out, b.add(b.mul(out_pitch, INT64(i)), INT64(4 * width * v)))
            b.store(b.load(slot), pointer(b, at, kind)).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, lanes, tile_rows, tile_vectors), code
