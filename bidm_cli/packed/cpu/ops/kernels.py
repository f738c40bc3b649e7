"""Kernels that the CPU's operations are made of, each in the forms that this machine takes."""

from __future__ import annotations

import functools

from bidm_cli.errors import BidmError
from bidm_cli.packed.cpu.codegen.isa import FLOAT_TILES, SCORES, Tile, instruction_set
from bidm_cli.packed.cpu.ops import structs
from bidm_cli.packed.cpu.runtime.compile import Kernel
from bidm_cli.packed.uses import Products


@functools.cache
def pack(form: str) -> Kernel:
    """Binarization of activations after a norm and SiLU, by the form (:data:`structs.PACK_FORMS`)."""
    return Kernel("bidm_cli.packed.cpu.ops.pack_kernel:make_pack", (form,), structs.PACK_ARGS.itemsize)


@functools.cache
def conv(tile: Tile) -> Kernel:
    """Binary convolution by one form of the inner loop."""
    if tile.multiplies:
        _need_matrix_unit(f"the tile {tile}")
        amx = "bidm_cli.packed.cpu.ops.amx_conv_kernel:make_amx_conv"
        return Kernel(amx, (tile.lanes,), structs.CONV_ARGS.itemsize)
    form = (tile.method, tile.lanes, tile.pixels, tile.vectors)
    return Kernel("bidm_cli.packed.cpu.ops.conv_kernel:make_conv", form, structs.CONV_ARGS.itemsize)


@functools.cache
def norm() -> Kernel:
    """Group norm as factors and offsets."""
    return Kernel("bidm_cli.packed.cpu.ops.norm_kernel:make_norm", (), structs.NORM_ARGS.itemsize)


@functools.cache
def blend() -> Kernel:
    """Blending of cross-timestep connections."""
    return Kernel("bidm_cli.packed.cpu.ops.blend_kernel:make_blend", (), structs.BLEND_ARGS.itemsize)


@functools.cache
def attention() -> tuple[Kernel, Kernel]:
    """Attention with float scores: the layout of keys and values, and the rest."""
    tile, size = FLOAT_TILES[instruction_set()], structs.ATTENTION_ARGS.itemsize
    here = "bidm_cli.packed.cpu.ops.attention_kernel"
    arrange = Kernel(f"{here}:make_arrange", (tile.lanes, tile.vectors), size)
    return arrange, Kernel(f"{here}:make_attend", (tile.lanes, tile.rows, tile.vectors), size)


@functools.cache
def matrix_attention(parts: int) -> tuple[Kernel, Kernel]:
    """The same on a matrix unit, with numbers cut into so many bfloat16 parts."""
    _need_matrix_unit("attention on a matrix unit")
    here, size = "bidm_cli.packed.cpu.ops.amx_attention_kernel", structs.MATRIX_ATTENTION_ARGS.itemsize
    arrange = Kernel(f"{here}:make_amx_arrange", (parts,), size)
    return arrange, Kernel(f"{here}:make_amx_attend", (parts,), size)


PARTS: dict[Products, int] = {"float32": 3, "bfloat16": 1}
"""Parts of numbers by the products' precision."""


def float_attention(products: Products) -> tuple[Kernel, ...]:
    """Kernels that attention of this precision may need here, by its shapes."""
    return (*attention(), *matrix_attention(PARTS[products])) if instruction_set() == "amx" else attention()


@functools.cache
def binary_attention() -> tuple[Kernel, Kernel]:
    """The same with binary scores."""
    tile, size = FLOAT_TILES[instruction_set()], structs.BINARY_ATTENTION_ARGS.itemsize
    here, method = "bidm_cli.packed.cpu.ops.binary_attention_kernel", SCORES[instruction_set()]
    arrange = Kernel(f"{here}:make_arrange_binary", (tile.lanes, tile.vectors), size)
    form = (method, tile.lanes, tile.rows, tile.vectors)
    return arrange, Kernel(f"{here}:make_attend_binary", form, size)


@functools.cache
def winograd() -> tuple[Kernel, Kernel]:
    """Float 3x3 convolution: the transform of the weights, and the rest."""
    tile, here = FLOAT_TILES[instruction_set()], "bidm_cli.packed.cpu.ops.winograd_kernel"
    size = structs.WINOGRAD_WEIGHTS_ARGS.itemsize
    weights = Kernel(f"{here}:make_winograd_weights", (tile.lanes, tile.vectors), size)
    form = (tile.lanes, tile.rows, tile.vectors, structs.WINOGRAD_TILES * tile.rows)
    return weights, Kernel(f"{here}:make_winograd", form, structs.WINOGRAD_ARGS.itemsize)


def _need_matrix_unit(what: str) -> None:
    if instruction_set() != "amx":
        raise BidmError(f"{what} needs a processor with AMX, and a system that grants its use")
