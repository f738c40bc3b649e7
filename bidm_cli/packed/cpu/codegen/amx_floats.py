"""Float products on the matrix unit of recent x86 processors (AMX), of sums of bfloat16 numbers.

    sum over k of left[i, k] right[k, j],    left = left_0 + left_1 + ..., right alike

of the products of parts only those up to the size of the last part: with two parts 00, 01 and 10, with
three also 02, 20 and 11. A panel is 32 rows of ``left``, or 32 columns of ``right``, in steps of 32 k:

    left: bfloat16 [steps, parts, 2, 16 rows, 32 k]
    right: bfloat16 [steps, parts, 2, 16 pairs of k, 16 columns, 2]

The k of a step come in pairs, whose order is the caller's: the same on the left as on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bidm_cli.packed.cpu.codegen.amx import DEPTH, TILE, TILE_BYTES, move_tile, operate_tiles
from bidm_cli.packed.cpu.codegen.isa import MATRIX_SIDE
from bidm_cli.packed.cpu.codegen.vector import INT64, emitted

SIDE = MATRIX_SIDE
"""Rows and columns of a block of the product, and k of a step: two tiles."""

PART_BYTES = 2 * TILE_BYTES
"""Bytes of one part of one step of a panel."""

ROW_BYTES = 4 * SIDE
BLOCK_BYTES = SIDE * ROW_BYTES
"""Bytes of a row and of all of a block of the product, float32."""


def _move_block(b: ir.IRBuilder, name: str, address: ir.Value) -> None:
    """Load or store the four tiles of a block of the product."""
    for tile in range(4):
        down, right = divmod(tile, 2)
        at = b.add(address, INT64(ROW_BYTES * TILE * down + DEPTH * right))
        move_tile(b, name, tile, at, INT64(ROW_BYTES))


@emitted(lambda address: types.void(types.int64))
def start_block(b: Any, address: Any) -> None:
    """Start a block of the product from the one at an address, or from zeros if that is 0."""
    with b.if_else(b.icmp_signed("!=", address, INT64(0))) as (then, otherwise):
        with then:
            _move_block(b, "tileloadd64", address)
        with otherwise:
            for tile in range(4):
                operate_tiles(b, "tilezero", tile)


_PRODUCTS = {
    1: [(0, 0)],
    2: [(1, 0), (0, 0), (0, 1)],
    3: [(2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)],
}
"""(left, right) by parts, so ordered that few tiles are loaded."""

Step = Callable[[], None]
"""Emits some instructions."""


def product_steps(b: ir.IRBuilder, left: ir.Value, right: ir.Value, parts: int) -> list[Step]:
    """Steps that add to the block the product of a step of panels; other code may stand between them."""
    sides = (left, right)

    def step(loads: list[tuple[int, int]], tiles: list[int], wanted: tuple[int, int]) -> Step:
        def emit() -> None:
            for side, half in loads:
                at = b.add(sides[side], INT64(PART_BYTES * wanted[side] + TILE_BYTES * half))
                move_tile(b, "tileloadd64", 4 + 2 * side + half, at, INT64(DEPTH))
            for tile in tiles:
                operate_tiles(b, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)

        return emit

    found, here = [], (-1, -1)
    for wanted in _PRODUCTS[parts]:
        if wanted[0] != here[0] and wanted[1] != here[1]:
            orders = [([(0, 0), (1, 0)], [0]), ([(1, 1)], [1]), ([(0, 1)], [2, 3])]
        elif wanted[0] != here[0]:
            orders = [([(0, 0)], [0, 1]), ([(0, 1)], [2, 3])]
        else:
            orders = [([(1, 0)], [0, 2]), ([(1, 1)], [1, 3])]
        found += [step(loads, tiles, wanted) for loads, tiles in orders]
        here = wanted
    return found


@intrinsic(prefer_literal=True)
def add_product(typingctx: Any, left: Any, right: Any, parts: Any) -> Any:
    """Add to the block the product of a step of panels, of so many (literal) parts."""

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        for step in product_steps(b, *arguments[:2], parts.literal_value):
            step()
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, parts), code


@emitted(lambda address: types.void(types.int64))
def store_block(b: Any, address: Any) -> None:
    """Write the block, float32 [32, 32]."""
    _move_block(b, "tilestored64", address)
