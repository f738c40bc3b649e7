"""A layer on one input shape: records filled in, workspaces taken, ready to run.

plan = ConvPlan(weights, (images, height, width))   # once a layer, shape and thread
shortcut = plan.pack((x,))                          # every call: a few addresses and a launch each
plan.convolve(out, shortcut)
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import torch
from torch import Tensor

from bidm_cli.packed.cpu.ops.norm import ELEMENTS, NormPlan, PixelNorm
from bidm_cli.packed.cpu.ops.shortcut_map import Axis, shortcut_axis
from bidm_cli.packed.cpu.ops.weights import CpuWeights
from bidm_cli.packed.cpu.runtime.args import BLOCK, CONV_JOB, PACK_JOB, record
from bidm_cli.packed.cpu.runtime.compile import conv_launcher, pack_launcher
from bidm_cli.packed.cpu.runtime.threads import threads_for
from bidm_cli.packed.format.bits import words_per_tap

PRODUCTS = 1 << 24
"""Products of signs that are worth a thread of their own, about 10 microseconds."""


def _inside_masks(size: int, out: int, kernel: int, stride: int, before: int) -> list[int]:
    """For each output position, the mask of kernel taps inside the image, along one axis."""
    return [sum(1 << d for d in range(kernel) if 0 <= i * stride - before + d < size) for i in range(out)]


@functools.lru_cache(maxsize=256)
def _zeros(thread: int, kind: torch.dtype, shape: tuple[int, ...], border: tuple[int, ...]) -> Tensor:
    """A workspace of one thread. The border is never written to, so it stays zero between layers."""
    return torch.zeros(shape, dtype=kind)


class ConvPlan:
    """A binary convolution (or linear layer) on one input shape, channels last, in one thread.

    Args:
        size: (images, height, width) of the input. split: channels of its first part, if it comes in two.
        repeat: each pixel stands for a square of so many by so many.

    Attributes:
        bits, sums: what :meth:`pack` leaves, in a border of zeros. inside: the index of what it encloses.
            Both are shared with other plans of the thread, so they hold until the next layer runs.
        out_size: (H', W').
        reads_input: whether the kernels work out the shortcut's P(I) from what :meth:`pack` returns.
    """

    def __init__(
        self, weights: CpuWeights, size: tuple[int, int, int], split: int | None = None, repeat: int = 1
    ) -> None:
        self.weights = weights
        geometry = weights.geometry
        self._split, self._repeat = geometry.in_channels if split is None else split, repeat
        left, right, top, bottom = geometry.padding
        words = words_per_tap(geometry.in_channels)
        images, height, width = size[0], repeat * size[1], repeat * size[2]
        padded = (images, height + top + bottom, width + left + right)
        border = (left, right, top, bottom)
        thread = threading.get_ident()
        self.bits = _zeros(thread, torch.int32, (*padded, words), border)
        self.sums = _zeros(thread, torch.float32, padded, border)
        self.inside = (slice(None), slice(top, top + height), slice(left, left + width))
        self.out_size = geometry.output_size(height, width)
        self._elements = math.prod(size) * geometry.in_channels
        self._products = images * math.prod(self.out_size) * geometry.out_channels * geometry.fan_in
        axes = self._shortcut_axes(*size[1:])
        self.reads_input = axes is not None
        self._axes = axes or (_whole(size[1], self.out_size[0]), _whole(size[2], self.out_size[1]))
        self._pools = self._axes[0].cell * self._axes[1].cell > 1
        self._values_shape = (images, self._axes[0].cells, self._axes[1].cells, geometry.in_channels)
        self._pack = self._pack_job(*size)
        self._conv = self._conv_job(images, height, width)
        self._launch_conv = conv_launcher(weights.tile)
        self._pack_at, self._conv_at = self._pack.ctypes.data, self._conv.ctypes.data

    def _shortcut_axes(self, height: int, width: int) -> tuple[Axis, Axis] | None:
        """How the kernels themselves bring the input to the shortcut's P(I); None if they cannot."""
        geometry, lanes = self.weights.geometry, self.weights.tile.lanes
        c, o = geometry.in_channels, geometry.out_channels
        channels_fit = c == o or (c % lanes == 0 and (c < o or o % lanes == 0))
        self._copies_parts = self._split % lanes != 0 and self._split != c
        if not self.weights.shortcut_scale or self.weights.shortcut_conv or not channels_fit:
            return None
        rows, columns = map(
            shortcut_axis, (height, width), self.out_size, geometry.stride, 2 * (self._repeat,)
        )
        return None if rows is None or columns is None else (rows, columns)

    def _pack_job(self, images: int, height: int, width: int) -> np.ndarray:
        geometry = self.weights.geometry
        scaled = self.weights.scale_filter is not None
        rows, columns = self._axes
        cells = images * rows.cells * columns.cells
        values = {
            "images": images,
            "height": height,
            "width": width,
            "channels": geometry.in_channels,
            "split": self._split,
            "repeat": self._repeat,
            "limits": self.weights.limits.data_ptr(),
            "bits": self.bits.data_ptr(),
            "words": self.bits.shape[-1],
            "padded_height": self.bits.shape[1],
            "padded_width": self.bits.shape[2],
            "top": geometry.padding[2],
            "left": geometry.padding[0],
            "sums": self.sums.data_ptr() if scaled else 0,
            "cell_rows": rows.cells,
            "cell_columns": columns.cells,
            "cell_height": rows.cell,
            "cell_width": columns.cell,
            "pools": self._pools,
            "block": max(1, min(cells // 8, 16384 // (rows.cell * columns.cell * geometry.in_channels))),
            "divisor": geometry.in_channels,
        }
        return record(PACK_JOB, values)

    def _conv_job(self, images: int, height: int, width: int) -> np.ndarray:
        weights, geometry = self.weights, self.weights.geometry
        (kh, kw), (sh, sw) = geometry.kernel, geometry.stride
        out_height, out_width = self.out_size
        rows = _inside_masks(height, out_height, kh, sh, geometry.padding[2])
        columns = _inside_masks(width, out_width, kw, sw, geometry.padding[0])
        row_kinds, column_kinds = sorted(set(rows)), sorted(set(columns))
        self._row_class = np.array([row_kinds.index(r) for r in rows], np.int32)
        self._column_class = np.array([column_kinds.index(c) for c in columns], np.int32)
        self._corrections = weights.corrections_for(row_kinds, column_kinds)
        groups = len(weights.words)
        block, group_step = _items(images * out_height * out_width, groups, weights.tile.pixels)
        scale_filter = weights.scale_filter
        values = {
            "bits": self.bits.data_ptr(),
            "weights": weights.words.data_ptr(),
            "images": images,
            "padded_height": self.bits.shape[1],
            "padded_width": self.bits.shape[2],
            "words": self.bits.shape[-1],
            "rows": kh,
            "columns": kw,
            "stride_y": sh,
            "stride_x": sw,
            "out_height": out_height,
            "out_width": out_width,
            "out_channels": geometry.out_channels,
            "groups": groups,
            "block": block,
            "group_step": group_step,
            "row_class": self._row_class.ctypes.data,
            "column_class": self._column_class.ctypes.data,
            "column_classes": len(column_kinds),
            "corrections": self._corrections.data_ptr(),
            "correction_pitch": self._corrections.shape[1],
            "sums": 0 if scale_filter is None else self.sums.data_ptr(),
            "scale_filter": 0 if scale_filter is None else scale_filter.data_ptr(),
            "weight_scale": weights.weight_scale.data_ptr(),
            "bias": weights.bias.data_ptr(),
            "shortcut_channels": geometry.in_channels if self.reads_input else geometry.out_channels,
            "cell_rows": self._axes[0].cells if self.reads_input else out_height,
            "cell_columns": self._axes[1].cells if self.reads_input else out_width,
            "cell_y": self._axes[0].reads.ctypes.data,
            "cell_x": self._axes[1].reads.ctypes.data,
            "shortcut_scale": weights.shortcut_scale,
        }
        return record(CONV_JOB, values)

    def pack(
        self, x: tuple[Tensor, ...], norm: NormPlan | PixelNorm | None = None, silu: bool = False
    ) -> tuple[Tensor, ...]:
        """Fill ``bits`` and ``sums`` from float32 x [images, height, width, C] (contiguous).

        Args:
            x: one tensor, or two with the channels one after the other.
            norm: its factors and offsets are applied first, and SiLU after them if asked for.

        Returns:
            What the shortcut reads, nothing without a shortcut: the input, after a norm if there is one, and
            averaged over the stride's cells if ``reads_input``.
        """
        job = self._pack
        job["x"], job["second"] = x[0].data_ptr(), x[-1].data_ptr()
        form = "plain"
        if norm is not None:
            form = f"{norm.form}_silu" if silu else norm.form
            job["factors"], job["offsets"] = norm.factors.data_ptr(), norm.offsets.data_ptr()
        values = x if self.weights.shortcut_scale else ()
        copies = len(x) == 2 and (self._copies_parts or not self.reads_input)
        job["values"] = 0
        if values and (norm is not None or self._pools or copies):
            values = (torch.empty(self._values_shape),)
            job["values"] = values[0].data_ptr()
        pack_launcher(form)(self._pack_at, threads_for(self._elements, ELEMENTS), (self, norm))
        return values

    def convolve(
        self,
        out: Tensor,
        shortcut: tuple[Tensor, ...] = (),
        offset: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """y from ``bits`` and ``sums`` into float32 out [images, out height, out width, O] (contiguous).

        Args:
            shortcut: if ``reads_input`` then what :meth:`pack` returned, else P(I), [images, out height, out
                width, O].
            offset: [images, O], added to every pixel of an image. residual: as ``out``, added.
        """
        job = self._conv
        job["out"] = out.data_ptr()
        job["shortcut"] = shortcut[0].data_ptr() if shortcut else 0
        job["second_shortcut"] = shortcut[-1].data_ptr() if shortcut else 0
        job["shortcut_split"] = self._split if len(shortcut) == 2 else job["shortcut_channels"]
        job["offset"] = 0 if offset is None else offset.data_ptr()
        job["residual"] = 0 if residual is None else residual.data_ptr()
        self._launch_conv(self._conv_at, threads_for(self._products, PRODUCTS), self)


def _whole(size: int, out: int) -> Axis:
    """An axis without cells; the shortcut, if any, comes with one position for each of the output."""
    return Axis(1, size, np.arange(out, dtype=np.int32))


def _items(pixels: int, groups: int, tile_pixels: int) -> tuple[int, int]:
    """(pixels, filter groups) of an item: large enough to reuse weights, small enough for all threads."""
    wanted = 4 * torch.get_num_threads()
    block = min(BLOCK, -(-pixels // tile_pixels) * tile_pixels)
    while block > 2 * tile_pixels and -(-pixels // block) * groups < wanted:
        block //= 2
    blocks = -(-pixels // block)
    splits = min(groups, max(1, -(-wanted // blocks)))
    return block, -(-groups // splits)
