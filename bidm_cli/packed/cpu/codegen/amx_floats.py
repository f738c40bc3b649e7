"""Float products on the matrix unit of recent x86 processors (AMX), of sums of bfloat16 numbers.

    sum over k of left[i, k] right[k, j],    left = left_0 + left_1 + ..., right alike

of the products of parts only those up to the size of the last part: with two parts 00, 01 and 10, with
three also 02, 20 and 11. A panel is 32 rows of ``left``, or 32 columns of ``right``, in steps of 32 k:

    left: bfloat16 [steps, parts, 2, 16 rows, 32 k]      right: bfloat16 [steps, parts, 2, 16 k, 16 columns, 2]

The k of a step come in pairs, whose order is the caller's: the same on the left as on the right.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.amx import DEPTH, TILE, TILE_BYTES, move_tile, operate_tiles
from bidm_cli.packed.cpu.codegen.isa import MATRIX_SIDE
from bidm_cli.packed.cpu.codegen.vector import INT64

SIDE = MATRIX_SIDE
"""Rows and columns of a block of the product, and k of a step: two tiles."""

PART_BYTES = 2 * TILE_BYTES
"""Bytes of one part of one step of a panel."""

ROW_BYTES = 4 * SIDE
BLOCK_BYTES = SIDE * ROW_BYTES
"""Bytes of a row and of all of a block of the product, float32."""

_PRODUCTS = {
    1: [(0, 0)],
    2: [(1, 0), (0, 0), (0, 1)],
    3: [(2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)],
}
"""(left, right) by parts, so ordered that few tiles are loaded."""


def _block_tiles(b: ir.IRBuilder, name: str, address: ir.Value) -> None:
    """Load or store the four tiles of a block of the product."""
    for tile in range(4):
        down, right = divmod(tile, 2)
        at = b.add(address, INT64(ROW_BYTES * TILE * down + DEPTH * right))
        move_tile(b, name, tile, at, INT64(ROW_BYTES))


def _multiply_step(b: ir.IRBuilder, left: ir.Value, right: ir.Value, parts: int) -> None:
    """Add the products of one step to the tiles of the block."""
    here: tuple[int, int] = (-1, -1)
    for wanted in _PRODUCTS[parts]:
        for side, first in ((0, 4), (1, 6)):
            for tile in range(2 if wanted[side] != here[side] else 0):
                at = b.add((left, right)[side], INT64(PART_BYTES * wanted[side] + TILE_BYTES * tile))
                move_tile(b, "tileloadd64", first + tile, at, INT64(DEPTH))
        here = wanted
        for tile in range(4):
            operate_tiles(b, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)


@intrinsic(prefer_literal=True)
def multiply_floats(
    typingctx: Any, left: Any, right: Any, steps: Any, start: Any, sums: Any, parts: Any
) -> Any:
    """Multiply 32 rows by 32 columns.

    Args (int64 unless literal):
        left, right: addresses of panels, as above.
        start: address of a block, float32 [32, 32], that the product is added to; 0 for none.
        sums: address of the result, such a block; may be ``start``.
        parts: literal.
    """
    count = parts.literal_value

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        left, right, steps, start, sums, _ = arguments
        with b.if_else(b.icmp_signed("!=", start, INT64(0))) as (then, otherwise):
            with then:
                _block_tiles(b, "tileloadd64", start)
            with otherwise:
                for tile in range(4):
                    operate_tiles(b, "tilezero", tile)
        with cgutils.for_range(b, steps) as step:
            offset = b.mul(step.index, INT64(count * PART_BYTES))
            _multiply_step(b, b.add(left, offset), b.add(right, offset), count)
        _block_tiles(b, "tilestored64", sums)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, parts), code
