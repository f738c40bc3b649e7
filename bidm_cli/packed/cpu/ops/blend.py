"""Blending of cross-timestep connections in one pass: out = (1 - beta) new + beta old, one beta per image."""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.packed.cpu.ops import kernels
from bidm_cli.packed.cpu.ops.structs import BLEND_ARGS
from bidm_cli.packed.cpu.runtime.args import record
from bidm_cli.packed.cpu.runtime.kernels import launcher_of
from bidm_cli.packed.cpu.runtime.threads import ELEMENTS, is_capturing, most_threads

_BLOCK = 1 << 13
"""Elements per item."""


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
    launcher_of(kernels.blend())(args.ctypes.data, most_threads(new.numel(), ELEMENTS), (args, betas))
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
