"""Binary convolutions, and linear layers as 1x1 ones, on packed signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cupy_kernels.kernel import Field, Kernel, Launcher
from cupy_kernels.signs import WORD, Signs
from cupy_kernels.tiles import ConvSize, Tile, best_tile

Tier = Literal["auto", "popc", "bmma"]

_POPC_TILE = 64
_POPC_SHARED = 4 * 2 * 16 * (64 + 4) + 16 * 64 + 4 * 64 * 64
_BMMA_FROM = 80


@dataclass(frozen=True)
class ConvShape:
    """A layer's shape: kernel (kh, kw), stride (sh, sw), zeros at the (left, right, top, bottom)."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def words(self) -> int:
        """Words of a pixel, or of a tap of a filter."""
        return -(-self.in_channels // WORD)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether every output pixel reads the input pixel of its own place and no other."""
        return self.taps == 1 and self.stride == (1, 1) and not any(self.padding)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        left, right, top, bottom = self.padding
        return (
            (height + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (width + left + right - self.kernel[1]) // self.stride[1] + 1,
        )


@dataclass
class PaddingCorrection:
    """The correction for taps outside the image, by classes of output rows and columns.

    Attributes:
        table: int32 [row classes * column_classes, O]: bits inside - 2 popcount(taps inside).
        row_class, column_class: int32 [H'], [W'].
    """

    table: Tensor
    row_class: Tensor
    column_class: Tensor
    column_classes: int


@dataclass
class ConvWeights:
    """A layer's tensors, float32 on the device; absent parts are None.

    Attributes:
        words: int32 [O, kh kw, ceil(C / 32)]. scale_filter: k [kh, kw]. weight_scale, bias: [O].
    """

    shape: ConvShape
    words: Tensor
    scale_filter: Tensor | None = None
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    _borders: dict[tuple[int, int], PaddingCorrection] = field(default_factory=dict)

    def borders(self, height: int, width: int) -> PaddingCorrection:
        """The corrections for an input size; made at its first use, with copies to the device."""
        if (height, width) not in self._borders:
            self._borders[height, width] = self._make_padding_correction(height, width)
        return self._borders[height, width]

    def _make_padding_correction(self, height: int, width: int) -> PaddingCorrection:
        (kh, kw), (sh, sw), (left, _, top, _) = self.shape.kernel, self.shape.stride, self.shape.padding
        out_height, out_width = self.shape.output_size(height, width)
        rows = [_inside(i * sh - top, kh, height) for i in range(out_height)]
        columns = [_inside(i * sw - left, kw, width) for i in range(out_width)]
        row_kinds, column_kinds = sorted(set(rows)), sorted(set(columns))
        inside = torch.tensor(
            [[a and b for a in r for b in c] for r in row_kinds for c in column_kinds], dtype=torch.float64
        ).to(self.words.device)
        # Exact in float64, and a matrix product of integers is not there on every device.
        ones = _popcount(self.words).sum(dim=2).double()
        table = inside.sum(1, keepdim=True) * self.shape.in_channels - 2 * inside @ ones.T
        return PaddingCorrection(
            table.round().int().contiguous(),
            _classes(rows, row_kinds, self.words.device),
            _classes(columns, column_kinds, self.words.device),
            len(column_kinds),
        )


@dataclass(frozen=True)
class EpilogueInputs:
    """What the epilogue adds to D . K . alpha + bias; every tensor of the output's type and contiguous.

    Attributes:
        shortcut: [N, H', W', C']: channels are repeated or averaged to O. shortcut_scale: |s|.
        offset: [N, O], added to all pixels of an image. residual: [N, H', W', O].
    """

    shortcut: Tensor | None = None
    shortcut_scale: float = 0.0
    offset: Tensor | None = None
    residual: Tensor | None = None


NOTHING = EpilogueInputs()


def convolve(
    launcher: Launcher,
    signs: Signs,
    weights: ConvWeights,
    dtype: torch.dtype,
    extras: EpilogueInputs = NOTHING,
    *,
    integers: bool = False,
    tier: Tier | Tile = "auto",
) -> Tensor:
    """y [N, H', W', O] of type ``dtype`` for signs [N, H, W]; with ``integers`` D itself, int32.

    ``tier``: "popc" (CUDA cores), "bmma" (binary tensor cores, or a tile for them), or what suits device and
    shape.

    Raises:
        ValueError: "bmma" for a layer that does not fit into shared memory.
    """
    shape = weights.shape
    images, height, width = signs.counts.shape
    out_height, out_width = shape.output_size(height, width)
    out = torch.empty(
        images,
        out_height,
        out_width,
        shape.out_channels,
        dtype=torch.int32 if integers else dtype,
        device=signs.words.device,
    )
    if not out.numel():
        return out
    fields = _fields(signs, weights, extras) | {"integers" if integers else "out": out}
    if shape.pointwise:
        # One long line of pixels: tiles are full whatever the image's size.
        images, height, width = 1, 1, images * height * width
        out_height, out_width = height, width
    sizes = {
        "images": images,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
    }
    fields |= sizes
    size = ConvSize(
        shape.words, shape.kernel, shape.stride, images, out_height, out_width, shape.out_channels
    )
    tile = tile_for(launcher, size, tier)
    if tile is None:
        _launch_popc(launcher, fields, size, dtype)
    else:
        _launch_bmma(launcher, fields, size, tile, dtype)
    return out


def tile_for(launcher: Launcher, size: ConvSize, tier: Tier | Tile = "auto") -> Tile | None:
    """The cut for the tensor-core tier; None for the other tier.

    Raises:
        ValueError: as :func:`convolve`.
    """
    if isinstance(tier, Tile):
        return tier
    if tier == "popc" or (tier == "auto" and launcher.capability < _BMMA_FROM):
        return None
    tile = best_tile(size, launcher.multiprocessors, launcher.shared_memory)
    if tile is None and tier == "bmma":
        raise ValueError(f"{size} does not fit into {launcher.shared_memory} bytes of shared memory")
    return tile


def _fields(signs: Signs, weights: ConvWeights, extras: EpilogueInputs) -> dict[str, Field]:
    """All but sizes and the output."""
    shape = weights.shape
    _, height, width = signs.counts.shape
    out_height, out_width = shape.output_size(height, width)
    borders = weights.borders(1, 1) if shape.pointwise else weights.borders(height, width)
    scaled = weights.scale_filter is not None
    shortcut_channels = 0 if extras.shortcut is None else extras.shortcut.shape[-1]
    return {
        "words": signs.words,
        "counts": signs.counts,
        "magnitudes": signs.magnitudes if scaled else None,
        "weights": weights.words,
        "corrections": borders.table,
        "row_class": None if shape.pointwise else borders.row_class,
        "column_class": None if shape.pointwise else borders.column_class,
        "column_classes": borders.column_classes,
        "scale_filter": weights.scale_filter,
        "weight_scale": weights.weight_scale,
        "bias": weights.bias,
        "shortcut": extras.shortcut,
        "shortcut_scale": extras.shortcut_scale,
        "shortcut_channels": shortcut_channels,
        "offset": extras.offset,
        "residual": extras.residual,
        "word_count": shape.words,
        "out_channels": shape.out_channels,
        "rows": shape.kernel[0],
        "columns": shape.kernel[1],
        "stride_y": shape.stride[0],
        "stride_x": shape.stride[1],
        "top": shape.padding[2],
        "left": shape.padding[0],
        "paired": _paired(shape.out_channels, extras),
        "image_pixels": out_height * out_width,
    }


def _paired(out_channels: int, extras: EpilogueInputs) -> int:
    """Whether neighbouring channels may be read at once: even widths, and addresses that allow it."""
    large = [t for t in (extras.shortcut, extras.residual) if t is not None]
    even = all(t.shape[-1] % 2 == 0 and t.data_ptr() % (2 * t.element_size()) == 0 for t in large)
    return int(out_channels % 2 == 0 and even)


def _launch_popc(launcher: Launcher, fields: dict[str, Field], size: ConvSize, dtype: torch.dtype) -> None:
    pixels = size.images * size.height * size.width
    grid = (-(-pixels // _POPC_TILE), -(-size.filters // _POPC_TILE))
    launcher.launch(Kernel("conv_popc.cu", "conv_popc", "ConvJob", dtype), grid, fields, _POPC_SHARED)


def _launch_bmma(
    launcher: Launcher, fields: dict[str, Field], size: ConvSize, tile: Tile, dtype: torch.dtype
) -> None:
    slices = -(-size.filters // tile.filters)
    resident = launcher.multiprocessors * tile.blocks_together(size, launcher.shared_memory)
    grid = (min(tile.boxes(size), max(1, resident // slices)), slices)
    macros = (
        ("WORDS", size.words),
        ("ROWS", size.kernel[0]),
        ("COLUMNS", size.kernel[1]),
        ("FILTER_TILES", tile.filter_tiles),
        ("WARPS", tile.warps),
    )
    kernel = Kernel("conv_bmma.cu", "conv_bmma", "ConvJob", dtype, macros)
    box = {"tile_images": tile.images, "tile_rows": tile.rows, "tile_columns": tile.columns}
    launcher.launch(kernel, grid, fields | box, tile.shared_memory(size))


def _inside(start: int, length: int, size: int) -> tuple[bool, ...]:
    """Which taps of a kernel that begins at ``start`` are inside an axis of ``size``."""
    return tuple(0 <= start + tap < size for tap in range(length))


def _classes(found: Sequence[Any], kinds: Sequence[Any], device: torch.device) -> Tensor:
    index = {kind: i for i, kind in enumerate(kinds)}
    return torch.tensor([index[kind] for kind in found], dtype=torch.int32).to(device)


def _popcount(words: Tensor) -> Tensor:
    """Bits that are 1, of each int32."""
    x = words.long() & 0xFFFFFFFF
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    x = x + (x >> 4) & 0x0F0F0F0F
    return (x * 0x01010101 & 0xFFFFFFFF) >> 24
