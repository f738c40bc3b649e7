"""Blending of cross-timestep connections on the CPU, in one pass over the features."""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.packed.cpu.ops.norm import ELEMENTS
from bidm_cli.packed.cpu.runtime.args import MIX_JOB, record
from bidm_cli.packed.cpu.runtime.compile import mix_launcher
from bidm_cli.packed.cpu.runtime.threads import is_listened_to, threads_for

_BLOCK = 1 << 13
"""Elements that a thread takes at a time."""


def blend(new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
    """(1 - beta) new + beta old for float32 features [N, ...] and betas [N].

    While a step is recorded it goes into the place of ``old``: the features belong to the recording then,
    which needs the old ones no more.
    """
    if new.dtype != torch.float32 or new.stride() != old.stride() or not _is_dense_by_image(new):
        return torch.lerp(new, old, betas.to(new.dtype).reshape(-1, *[1] * (new.dim() - 1)))
    betas = betas.float()
    out = old if is_listened_to() else torch.empty_like(new)
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
    job = record(MIX_JOB, values)
    mix_launcher()(job.ctypes.data, threads_for(new.numel(), ELEMENTS), (job, betas))
    return out


def _is_dense_by_image(x: Tensor) -> bool:
    """Whether each image's numbers lie side by side in some order, one image after the other."""
    by_step = sorted(zip(x.stride()[1:], x.shape[1:], strict=True))
    expected = 1
    for step, size in by_step:
        if size > 1 and step != expected:
            return False
        expected *= size
    return len(x) == 1 or x.stride(0) == expected
