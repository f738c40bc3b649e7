"""Group norms on the CPU, as factors and offsets that the next pass over the activations applies."""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bidm_cli.packed.cpu.ops.norm_kernel import BLOCK
from bidm_cli.packed.cpu.runtime.args import NORM_JOB, PACK_JOB, record
from bidm_cli.packed.cpu.runtime.compile import norm_launcher, pack_launcher
from bidm_cli.packed.cpu.runtime.threads import threads_for

ELEMENTS = 1 << 14
"""Activations that are worth a thread of their own."""


class NormPlan:
    """Group norm statistics on one shape: workspaces and a record, one a thread.

    Attributes:
        factors, offsets: the result, float32 [images, channels padded to 32].
        form: of the pack kernel that applies it, without SiLU.
    """

    form = "normed"

    def __init__(
        self, images: int, pixels: int, channels: int, split: int, groups: int, threads: int
    ) -> None:
        # The same blocks whatever the batch and the threads: an image comes out the same in any company.
        blocks = -(-pixels // BLOCK)
        line = -(-channels // 32) * 32
        self.factors, self.offsets = torch.zeros(2, images, line)
        self._sums = torch.zeros(images, blocks, 2, line)
        self._finished = np.zeros(images, np.int64)
        self._threads = threads
        values = {
            "images": images,
            "pixels": pixels,
            "channels": channels,
            "split": split,
            "groups": groups,
            "block": BLOCK,
            "blocks": blocks,
            "sums": self._sums.data_ptr(),
            "finished": self._finished.ctypes.data,
            "factors": self.factors.data_ptr(),
            "offsets": self.offsets.data_ptr(),
        }
        self._job = record(NORM_JOB, values)
        self._launch, self._at = norm_launcher(), self._job.ctypes.data

    def run(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        scale: Tensor | None,
        shift: Tensor | None,
        second: Tensor | None = None,
    ) -> None:
        """Work out ``factors`` and ``offsets`` for contiguous x [images, ..., channels].

        ``second`` has the channels that come after those of x, if the plan is for such a pair.
        ``scale`` and ``shift`` [images, channels] (both or none; last axis contiguous, the same strides) are
        FiLM's: the norm's result times 1 + scale, plus shift.
        """
        job = self._job
        job["x"], job["epsilon"] = x.data_ptr(), norm.eps
        job["second"] = 0 if second is None else second.data_ptr()
        job["gamma"] = 0 if norm.weight is None else norm.weight.data_ptr()
        job["beta"] = 0 if norm.bias is None else norm.bias.data_ptr()
        if scale is None or shift is None:
            job["scale"] = 0
        else:
            job["scale"], job["shift"], job["film_pitch"] = (
                scale.data_ptr(),
                shift.data_ptr(),
                scale.stride(0),
            )
        self._launch(self._at, self._threads, self)


class PixelNorm(NamedTuple):
    """An RMS norm, x / ||x|| times a factor a channel plus an offset; ||x|| is found while packing.

    Attributes: as :class:`NormPlan`.
    """

    factors: Tensor
    offsets: Tensor
    form: str = "rms"

    @classmethod
    def make(
        cls, images: int, factors: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> PixelNorm:
        """From factors [channels], and FiLM's scale and shift [images, channels]."""
        channels = len(factors)
        both = torch.zeros(2, images, -(-channels // 32) * 32)
        both[0, :, :channels] = factors if scale is None else factors * (1 + scale)
        if shift is not None:
            both[1, :, :channels] = shift
        return cls(both[0], both[1])


def normalize(x: Tensor, plan: NormPlan | PixelNorm, silu: bool) -> Tensor:
    """Apply a plan's factors and offsets, then SiLU if asked for, to contiguous x [N, H, W, C]."""
    out = torch.empty_like(x)
    images, height, width, channels = x.shape
    values = {
        "x": x.data_ptr(),
        "images": images,
        "height": height,
        "width": width,
        "channels": channels,
        "split": channels,
        "repeat": 1,
        "words": plan.factors.shape[1] // 32,
        "factors": plan.factors.data_ptr(),
        "offsets": plan.offsets.data_ptr(),
        "values": out.data_ptr(),
        "cell_rows": height,
        "cell_columns": width,
        "cell_height": 1,
        "cell_width": 1,
        "block": max(1, min(images * height * width // 8, 16384 // channels)),
    }
    job = record(PACK_JOB, values)
    threads = threads_for(x.numel(), ELEMENTS)
    pack_launcher(f"{plan.form}_silu" if silu else plan.form)(job.ctypes.data, threads, (job, plan))
    return out


@functools.lru_cache(maxsize=256)
def _plan(shape: tuple[int, int, int, int, int], threads: int, thread: int) -> NormPlan:
    return NormPlan(*shape, threads)


def norm_plan(x: Tensor, groups: int, second: Tensor | None = None) -> NormPlan:
    """The plan for x [images, height, width, channels]; valid until the next one of this shape.

    ``second``: more channels, as in :meth:`NormPlan.run`.
    """
    images, height, width, split = x.shape
    channels = split if second is None else split + second.shape[3]
    threads = threads_for(images * height * width * channels, ELEMENTS)
    return _plan((images, height * width, channels, split, groups), threads, threading.get_ident())
