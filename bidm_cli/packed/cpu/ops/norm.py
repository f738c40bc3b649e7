"""Norms on the CPU, as factors and offsets per channel that the next pass over the activations applies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bidm_cli.packed.cpu.ops import kernels
from bidm_cli.packed.cpu.ops.structs import NORM_ARGS, NORM_BLOCK, PACK_ARGS
from bidm_cli.packed.cpu.runtime.args import record
from bidm_cli.packed.cpu.runtime.kernels import launcher_of
from bidm_cli.packed.cpu.runtime.threads import ELEMENTS, most_threads
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES

_PER_CALL = ("x", "second", "gamma", "beta", "scale", "shift", "film_pitch", "epsilon")


class NormPlan:
    """Execution plan for the statistics of a group norm on one shape.

    Attributes:
        factors, offsets: the result, float32 [images, channels padded to 32].
        form: of the pack kernel that applies it, without SiLU.
    """

    form = "normed"

    def __init__(self, images: int, pixels: int, channels: int, split: int, groups: int) -> None:
        # The same blocks whatever the batch and the threads, so that an image's sums do not depend on them.
        blocks = -(-pixels // NORM_BLOCK)
        line = -(-channels // 32) * 32
        self.factors, self.offsets = torch.zeros(2, images, line)
        self._sums = torch.zeros(images, blocks, 2, line)
        self._finished = np.zeros(images, np.int64)
        self._threads = most_threads(images * pixels * channels, ELEMENTS)
        values = {
            "images": images,
            "pixels": pixels,
            "channels": channels,
            "split": split,
            "groups": groups,
            "block": NORM_BLOCK,
            "blocks": blocks,
            "sums": self._sums.data_ptr(),
            "finished": self._finished.ctypes.data,
            "factors": self.factors.data_ptr(),
            "offsets": self.offsets.data_ptr(),
        }
        self._args = record(NORM_ARGS, values, _PER_CALL)
        self._call, self._address = self._args[list(_PER_CALL)], self._args.ctypes.data
        self._launch = launcher_of(kernels.norm())

    def run(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        scale: Tensor | None,
        shift: Tensor | None,
        second: Tensor | None = None,
    ) -> None:
        """Compute ``factors`` and ``offsets`` for contiguous x [images, ..., channels].

        ``second`` has the channels that come after those of x, if the plan is for such a pair.
        ``scale`` and ``shift`` [images, channels] (both or none; last axis contiguous, the same strides) are
        FiLM's: the norm's result times 1 + scale, plus shift.
        """
        film = (0, 0, 0)
        if scale is not None and shift is not None:
            film = (scale.data_ptr(), shift.data_ptr(), scale.stride(0))
        tensors = (x, second, norm.weight, norm.bias)
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        self._call[0] = (*addresses, *film, norm.eps)
        self._launch(self._address, self._threads, self)


class PixelNorm(NamedTuple):
    """RMS norm, x / ||x|| times a factor per channel plus an offset; ||x|| is computed while packing.

    Attributes: as :class:`NormPlan`.
    """

    factors: Tensor
    offsets: Tensor
    form: str = "rms"

    @classmethod
    def make(
        cls, images: int, factors: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> PixelNorm:
        """Combine factors [channels] with FiLM's scale and shift [images, channels]."""
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
        "padded_height": height,
        "padded_width": width,
        "factors": plan.factors.data_ptr(),
        "offsets": plan.offsets.data_ptr(),
        "values": out.data_ptr(),
        "map_rows": height,
        "map_columns": width,
        "pool_height": 1,
        "pool_width": 1,
        "pools": False,
        "block": max(1, min(images * height * width // 8, 16384 // channels)),
        "divisor": channels,
    }
    args = record(PACK_ARGS, values)
    launch = launcher_of(kernels.pack(f"{plan.form}_silu" if silu else plan.form))
    launch(args.ctypes.data, most_threads(x.numel(), ELEMENTS), (args, plan))
    return out


def norm_plan(x: Tensor, groups: int, second: Tensor | None = None) -> NormPlan:
    """Get the plan for x [images, height, width, channels]; its results hold until it runs again.

    ``second``: more channels, as in :meth:`NormPlan.run`.
    """
    images, height, width, split = x.shape
    channels = split if second is None else split + second.shape[3]
    shape = (images, height * width, channels, split, groups)
    return WORKSPACES.get((NormPlan, shape), lambda: NormPlan(*shape))
