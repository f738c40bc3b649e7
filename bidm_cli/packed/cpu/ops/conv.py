"""Execution plan for one conv layer and input shape: kernel arguments and workspaces.

plan = ConvPlan(weights, (images, height, width))   # once per layer, shape and thread
shortcut = plan.pack((x,))                          # every call: a few addresses and a launch each
plan.convolve(out, shortcut)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bidm_cli.packed.cpu.codegen.isa import MATRIX_DEPTH, MATRIX_PIXELS
from bidm_cli.packed.cpu.ops import kernels
from bidm_cli.packed.cpu.ops.conv_items import conv_items
from bidm_cli.packed.cpu.ops.norm import NormPlan, PixelNorm
from bidm_cli.packed.cpu.ops.shortcut_map import Axis, shortcut_axis
from bidm_cli.packed.cpu.ops.structs import CONV_ARGS, PACK_ARGS
from bidm_cli.packed.cpu.ops.weights import CpuWeights
from bidm_cli.packed.cpu.runtime.args import record
from bidm_cli.packed.cpu.runtime.kernels import launcher_of
from bidm_cli.packed.cpu.runtime.threads import ELEMENTS, most_threads
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES
from bidm_cli.packed.format.bits import from_words, words_per_tap

PRODUCTS = 1 << 24
"""Products of signs that are worth a thread of their own, about 10 microseconds."""

_PACK_CALL = ("x", "second", "factors", "offsets", "values")
_CONV_CALL = ("out", "shortcut", "second_shortcut", "shortcut_split", "offset", "residual")
"""Fields that calls fill in."""


def _inside_masks(size: int, out: int, kernel: int, stride: int, before: int) -> list[int]:
    """Masks of the kernel taps inside the image, one per output position, along one axis."""
    return [sum(1 << d for d in range(kernel) if 0 <= i * stride - before + d < size) for i in range(out)]


def _zeros(kind: torch.dtype, shape: tuple[int, ...], unused: tuple[int, ...], behind: int = 0) -> Tensor:
    """A workspace of the thread, with room for ``behind`` more elements behind it.

    What is never written to, the border and surplus channels, stays zero between layers: they share it if
    ``unused``, its widths, is the same.
    """
    size = math.prod(shape)

    def make() -> Tensor:
        return torch.zeros(size + behind, dtype=kind)[:size].view(shape)

    return WORKSPACES.get((kind, shape, unused, behind), make)


class ConvPlan:
    """Execution plan for a conv or linear layer on one input shape, channels last, in one thread.

    Args:
        size: (images, height, width) of the input. split: channels of the first tensor of a virtual concat.
        repeat: factor of a virtual upsample.

    Attributes:
        bits: result of :meth:`pack`, int32 [planes, images, H, W, words] in a border of zeros; for a matrix
            unit uint8 [planes, images, H, W, 64 ceil(C / 64)], a byte for each bit. inside: the index of what
            the border encloses.
        sums: the same without planes and words.
            Both are shared with other plans of the thread, so they hold until the next layer runs.
        out_size: (H', W').
        reads_input: True if the kernels compute the shortcut's P(I) from the result of :meth:`pack`.
    """

    def __init__(
        self, weights: CpuWeights, size: tuple[int, int, int], split: int | None = None, repeat: int = 1
    ) -> None:
        self.weights, geometry = weights, weights.geometry
        self._split, self._repeat = geometry.in_channels if split is None else split, repeat
        left, right, top, bottom = geometry.padding
        images, height, width = size[0], repeat * size[1], repeat * size[2]
        padded = (images, height + top + bottom, width + left + right)
        border = (left, right, top, bottom)
        self.bits = self._space_for_bits(padded, border)
        self.sums = _zeros(torch.float32, padded, border)
        self.inside = (slice(None), slice(None), slice(top, top + height), slice(left, left + width))
        self.out_size = geometry.output_size(height, width)
        results = weights.planes * images * math.prod(self.out_size) * geometry.out_channels
        self._pack_threads = most_threads(math.prod(size) * geometry.in_channels, ELEMENTS)
        self._conv_threads = most_threads(results * geometry.fan_in, PRODUCTS)
        if weights.tile.multiplies:  # its workspaces are for so many
            self._conv_threads = min(self._conv_threads, torch.get_num_threads())
        axes = self._shortcut_axes(*size[1:])
        self.reads_input = axes is not None
        self._shortcut_channels = geometry.in_channels if self.reads_input else geometry.out_channels
        self._axes = axes or (_whole(size[1], self.out_size[0]), _whole(size[2], self.out_size[1]))
        self._pools = self._axes[0].pool * self._axes[1].pool > 1
        self._values_shape = (images, self._axes[0].size, self._axes[1].size, geometry.in_channels)
        self._pack, self._conv = self._pack_args(*size), self._conv_args(images, height, width)
        self._pack_address, self._conv_address = self._pack.ctypes.data, self._conv.ctypes.data
        self._pack_call, self._conv_call = self._pack[list(_PACK_CALL)], self._conv[list(_CONV_CALL)]
        self._launch_conv = launcher_of(kernels.conv(weights.tile))

    def _shortcut_axes(self, height: int, width: int) -> tuple[Axis, Axis] | None:
        """Maps from the input to the shortcut's P(I) that the kernels apply; None if they cannot."""
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

    def _pack_args(self, images: int, height: int, width: int) -> np.ndarray:
        geometry = self.weights.geometry
        scaled = self.weights.scale_filter is not None
        rows, columns = self._axes
        positions, pool = images * rows.size * columns.size, rows.pool * columns.pool
        values = {
            "images": images,
            "height": height,
            "width": width,
            "channels": geometry.in_channels,
            "split": self._split,
            "repeat": self._repeat,
            "limits": self.weights.limits.data_ptr(),
            "plane_offsets": _address(self.weights.plane_offset),
            **self._bits_args(),
            "word_bytes": 32 if self.weights.tile.multiplies else 4,
            "top": geometry.padding[2],
            "left": geometry.padding[0],
            "sums": self.sums.data_ptr() if scaled else 0,
            "map_rows": rows.size,
            "map_columns": columns.size,
            "pool_height": rows.pool,
            "pool_width": columns.pool,
            "pools": pool > 1,
            "block": max(1, min(positions // 8, 16384 // (pool * geometry.in_channels))),
            "divisor": geometry.in_channels,
        }
        return record(PACK_ARGS, values, _PACK_CALL)

    def _conv_args(self, images: int, height: int, width: int) -> np.ndarray:
        weights, geometry = self.weights, self.weights.geometry
        (kh, kw), (sh, sw) = geometry.kernel, geometry.stride
        out_height, out_width = self.out_size
        rows = _inside_masks(height, out_height, kh, sh, geometry.padding[2])
        columns = _inside_masks(width, out_width, kw, sw, geometry.padding[0])
        row_kinds, column_kinds = sorted(set(rows)), sorted(set(columns))
        self._row_class = np.array([row_kinds.index(r) for r in rows], np.int32)
        self._column_class = np.array([column_kinds.index(c) for c in columns], np.int32)
        self._corrections = weights.corrections_for(row_kinds, column_kinds)
        items, self._windows = conv_items(weights, (images, *self.out_size), self._conv_threads)
        values = {
            **self._bits_args(),
            **items,
            "plane_scales": _address(weights.plane_scale),
            "weights": weights.words.data_ptr(),
            "images": images,
            "rows": kh,
            "columns": kw,
            "stride_y": sh,
            "stride_x": sw,
            "out_height": out_height,
            "out_width": out_width,
            "out_channels": geometry.out_channels,
            "row_class": self._row_class.ctypes.data,
            "column_class": self._column_class.ctypes.data,
            "column_classes": len(column_kinds),
            "corrections": self._corrections.data_ptr(),
            "correction_pitch": self._corrections.shape[1],
            "sums": 0 if weights.scale_filter is None else self.sums.data_ptr(),
            "scale_filter": _address(weights.scale_filter),
            "weight_scale": weights.weight_scale.data_ptr(),
            "bias": weights.bias.data_ptr(),
            "shortcut_channels": self._shortcut_channels,
            "map_rows": self._axes[0].size if self.reads_input else out_height,
            "map_columns": self._axes[1].size if self.reads_input else out_width,
            "map_y": self._axes[0].reads.ctypes.data,
            "map_x": self._axes[1].reads.ctypes.data,
            "shortcut_scale": weights.shortcut_scale,
        }
        return record(CONV_ARGS, values, _CONV_CALL)

    def _bits_args(self) -> dict[str, int]:
        """Fields of both structs for ``bits``."""
        return {
            "bits": self.bits.data_ptr(),
            "padded_height": self.bits.shape[2],
            "padded_width": self.bits.shape[3],
            "words": words_per_tap(self.weights.geometry.in_channels),
            "pixel_bytes": self.bits.stride(3) * self.bits.itemsize,
            "plane_bytes": self.bits.stride(0) * self.bits.itemsize,
            "planes": self.weights.planes,
        }

    def _space_for_bits(self, padded: tuple[int, int, int], border: tuple[int, ...]) -> Tensor:
        """Workspace of ``bits``."""
        geometry, planes = self.weights.geometry, self.weights.planes
        words = words_per_tap(geometry.in_channels)
        if not self.weights.tile.multiplies:
            return _zeros(torch.int32, (planes, *padded, words), border)
        pixel = -(-geometry.in_channels // MATRIX_DEPTH) * MATRIX_DEPTH
        # A tile without all its pixels reads on as if it were whole.
        behind = MATRIX_PIXELS * geometry.stride[1] * pixel
        return _zeros(torch.uint8, (planes, *padded, pixel), (*border, pixel - 32 * words), behind)

    def signs(self) -> Tensor:
        """Signs in ``bits``, bool [planes, images, height, width, C]."""
        bits, channels = self.bits[self.inside], self.weights.geometry.in_channels
        return bits[..., :channels].bool() if bits.dtype == torch.uint8 else from_words(bits, channels)

    def pack(
        self, x: tuple[Tensor, ...], norm: NormPlan | PixelNorm | None = None, silu: bool = False
    ) -> tuple[Tensor, ...]:
        """Fill ``bits`` and ``sums`` from float32 x [images, height, width, C] (contiguous).

        Args:
            x: one tensor, or the two of a virtual concat.
            norm: its factors and offsets are applied first, and SiLU after them if asked for.

        Returns:
            Input of the shortcut, nothing without one: x, after a norm if there is one, and averaged to the
            shortcut map if ``reads_input``.
        """
        form, factors, offsets, copy = "plain", 0, 0, 0
        if norm is not None:
            form = f"{norm.form}_silu" if silu else norm.form
            factors, offsets = norm.factors.data_ptr(), norm.offsets.data_ptr()
        values = x if self.weights.shortcut_scale else ()
        joins = len(x) == 2 and (self._copies_parts or not self.reads_input)
        if values and (norm is not None or self._pools or joins):
            values = (torch.empty(self._values_shape),)
            copy = values[0].data_ptr()
        self._pack_call[0] = (x[0].data_ptr(), x[-1].data_ptr(), factors, offsets, copy)
        launcher_of(kernels.pack(form))(self._pack_address, self._pack_threads, (self, norm))
        return values

    def convolve(
        self,
        out: Tensor,
        shortcut: tuple[Tensor, ...] = (),
        offset: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """Compute y from ``bits`` and ``sums`` to float32 out [images, H', W', O] (contiguous).

        Args:
            shortcut: the result of :meth:`pack` if ``reads_input``, else P(I) [images, H', W', O].
            offset: [images, O], added to every pixel of an image. residual: as ``out``, added.
        """
        self._conv_call[0] = (
            out.data_ptr(),
            shortcut[0].data_ptr() if shortcut else 0,
            shortcut[-1].data_ptr() if shortcut else 0,
            self._split if len(shortcut) == 2 else self._shortcut_channels,
            _address(offset),
            _address(residual),
        )
        self._launch_conv(self._conv_address, self._conv_threads, self)


def _whole(size: int, out: int) -> Axis:
    """Identity axis, for a shortcut that already has one position per output position."""
    return Axis(1, size, np.arange(out, dtype=np.int32))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
