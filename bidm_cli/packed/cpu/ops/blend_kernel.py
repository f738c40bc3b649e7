"""Blend kernel: out = (1 - beta) new + beta old, one beta per image, in one pass."""

from __future__ import annotations

from typing import Any

from numba import carray, float32

from bidm_cli.packed.cpu.codegen.vector import (
    first_item,
    load_first_floats,
    load_float,
    load_floats,
    next_item,
    splat,
    store,
    store_first,
)
from bidm_cli.packed.cpu.codegen.vector_math import fused
from bidm_cli.packed.cpu.ops.structs import BLEND_ARGS
from bidm_cli.packed.cpu.runtime.args import Source


def make_blend() -> Source:
    """Make the kernel."""

    def blend(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        blocks = (args.length + args.block - 1) // args.block
        items = args.images * blocks
        item = first_item(pointer, items)
        while item < items:
            image = item // blocks
            first = (item - image * blocks) * args.block
            last = min(first + args.block, args.length)
            beta = load_float(args.betas + 4 * image * args.beta_step)
            share, rest = splat(beta, 32), splat(float32(1.0) - beta, 32)
            for i in range(image * args.length + first, image * args.length + last, 32):
                left = image * args.length + last - i
                if left >= 32:
                    new = load_floats(args.new + 4 * i, 32)
                    store(args.out + 4 * i, fused(load_floats(args.old + 4 * i, 32), share, new * rest))
                else:
                    new = load_first_floats(args.new + 4 * i, left, 32)
                    old = load_first_floats(args.old + 4 * i, left, 32)
                    store_first(args.out + 4 * i, fused(old, share, new * rest), left)
            item = next_item(pointer, items)

    return blend, BLEND_ARGS
