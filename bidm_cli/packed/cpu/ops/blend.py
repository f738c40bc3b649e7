"""Blending of cross-timestep connections in one pass: out = (1 - beta) new + beta old, one beta per image."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, float32
from torch import Tensor

from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
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
from bidm_cli.packed.cpu.runtime.args import args_dtype, record
from bidm_cli.packed.cpu.runtime.compile import kernel_launcher
from bidm_cli.packed.cpu.runtime.threads import ELEMENTS, Launch, is_capturing, most_threads

BLEND_ARGS = args_dtype(
    ("new", np.int64),  # float32 [images, length]
    ("old", np.int64),  # the same
    ("betas", np.int64),  # float32, one per image, beta_step floats apart
    ("beta_step", np.int64),
    ("out", np.int64),  # as new; may be new or old
    ("images", np.int64),
    ("length", np.int64),
    ("block", np.int64),  # elements per item, a multiple of 32
)

_BLOCK = 1 << 13
"""Elements per item."""


@functools.cache
def blend_launcher() -> Launch:
    """Launcher of the kernel."""

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
            item = next_item(address_of(pointer))

    return kernel_launcher(blend, "32", BLEND_ARGS)


def blend(new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
    """(1 - beta) new + beta old for float32 features [N, ...] and betas [N].

    While launches are captured the result replaces ``old``: the features belong to the capture then, which
    needs the old ones no more.
    """
    if new.dtype != torch.float32 or new.stride() != old.stride() or not _is_dense_by_image(new):
        return torch.lerp(new, old, betas.to(new.dtype).reshape(-1, *[1] * (new.dim() - 1)))
    betas = betas.float()
    out = old if is_capturing() else torch.empty_like(new)
    values = {
        "new": new.data_ptr(),
        "old": old.data_ptr(),
        "betas": betas.data_ptr(),
        "beta_step": betas.stride(0),
        "out": out.data_ptr(),
        "images": len(new),
        "length": new[0].numel(),
        "block": _BLOCK,
    }
    args = record(BLEND_ARGS, values)
    blend_launcher()(args.ctypes.data, most_threads(new.numel(), ELEMENTS), (args, betas))
    return out


def _is_dense_by_image(x: Tensor) -> bool:
    """Return True if each image's numbers lie side by side in some order, one image after the other."""
    by_step = sorted(zip(x.stride()[1:], x.shape[1:], strict=True))
    expected = 1
    for step, size in by_step:
        if size > 1 and step != expected:
            return False
        expected *= size
    return len(x) == 1 or x.stride(0) == expected
