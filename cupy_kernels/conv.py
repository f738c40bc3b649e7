"""Binary convolutions, and linear layers as 1x1 ones, on packed signs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cupy_kernels.kernel import Field, Kernel, Launcher
from cupy_kernels.signs import WORD, Signs
from cupy_kernels.tiles import ConvSize, Tile, best_tile, terms_bytes

Tier = Literal["auto", "popc", "bmma"]

_POPC_TILE = 64
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
        """Words per pixel, and per tap of a filter."""
        return -(-self.in_channels // WORD)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """True if every output pixel reads the input pixel of its own place and no other."""
        return self.taps == 1 and self.stride == (1, 1) and not any(self.padding)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        left, right, top, bottom = self.padding
        return (
            (height + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (width + left + right - self.kernel[1]) // self.stride[1] + 1,
        )


@dataclass
class PaddingCorrection:
    """Corrections for taps outside the image, by classes of output rows and columns; fields of ConvArgs.

    Attributes:
        corrections: int32 [row classes * column_classes, O]: bits inside - 2 popcount(taps inside).
        row_class, column_class: int32 [H'], [W'].
    """

    corrections: Tensor
    row_class: Tensor
    column_class: Tensor
    column_classes: int


@dataclass
class ConvWeights:
    """A layer's tensors, float32 on the device; absent parts are None.

    Attributes:
        words: int32 [O, kh kw, ceil(C / 32)]. scale_filter: k [kh, kw]. weight_scale, bias: [O].
        plane_scales: g of each activation plane but the first.
    """

    shape: ConvShape
    words: Tensor
    scale_filter: Tensor | None = None
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    plane_scales: tuple[float, ...] = ()
    _borders: dict[tuple[int, int], PaddingCorrection] = field(default_factory=dict)

    def borders(self, height: int, width: int) -> PaddingCorrection:
        """The corrections for an input size; made at its first use, with copies to the device."""
        if (height, width) not in self._borders:
            self._borders[height, width] = self._make_padding_correction(height, width)
        return self._borders[height, width]

    def _make_padding_correction(self, height: int, width: int) -> PaddingCorrection:
        (kh, kw), (sh, sw), (left, _, top, _) = self.shape.kernel, self.shape.stride, self.shape.padding
        out_height, out_width = self.shape.output_size(height, width)
        device = self.words.device
        row_classes, row_class = _classes(out_height, sh, top, kh, height)
        column_classes, column_class = _classes(out_width, sw, left, kw, width)
        inside = torch.tensor(
            [[a and b for a in r for b in c] for r in row_classes for c in column_classes],
            dtype=torch.float64,
        ).to(device)
        bits = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.int32, device=device)
        # Exact in float64, and a matrix product of integers is not there on every device.
        ones = bits[self.words.view(torch.uint8).int()].sum(dim=2).double()
        table = inside.sum(1, keepdim=True) * self.shape.in_channels - 2 * inside @ ones.T
        return PaddingCorrection(
            table.round().int().contiguous(),
            row_class.to(device),
            column_class.to(device),
            len(column_classes),
        )


@dataclass(frozen=True)
class EpilogueInputs:
    """Summands of the epilogue besides D . K . alpha + bias; fields of ConvArgs, contiguous and of y's type.

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
    """y [N, H', W', O] of type ``dtype`` for signs [N, H, W, planes]; with ``integers`` D itself, int32.

    ``tier``: "popc" (CUDA cores), "bmma" or a tile (binary tensor cores); "auto" by device and shape.

    Raises:
        ValueError: "bmma" for a layer that does not fit into shared memory; planes that the weights are not
            for; ``integers`` of several planes.
    """
    shape = weights.shape
    images, height, width, planes = signs.counts.shape
    if planes != 1 + len(weights.plane_scales) or (integers and planes > 1):
        raise ValueError(f"{planes} planes, plane_scales {weights.plane_scales}, integers {integers}")
    out_height, out_width = shape.output_size(height, width)
    out_type = torch.int32 if integers else dtype
    pixels = (images, out_height, out_width)
    out = torch.empty(*pixels, shape.out_channels, dtype=out_type, device=signs.words.device)
    if not out.numel():
        return out
    fields = _fields(signs, weights, extras) | {"integers" if integers else "out": out}
    if shape.pointwise:
        # One long line of pixels: tiles are full whatever the image's size.
        images, height, width = 1, 1, images * height * width
        out_height, out_width = height, width
        pixels = (images, out_height, out_width)
    fields |= {"images": images, "height": height, "width": width}
    fields |= {"out_height": out_height, "out_width": out_width}
    size = ConvSize(shape.words, shape.kernel, shape.stride, *pixels, shape.out_channels, planes)
    tile = tile_for(launcher, size, tier)
    if tile is None:
        _launch_popc(launcher, fields, size, dtype)
    else:
        _launch_bmma(launcher, fields, size, tile, dtype)
    return out


def tile_for(launcher: Launcher, size: ConvSize, tier: Tier | Tile = "auto") -> Tile | None:
    """Tile for the tensor-core tier; None for the other tier.

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
    """The kernels' arguments but sizes and the output."""
    shape = weights.shape
    _, height, width, _ = signs.counts.shape
    out_height, out_width = shape.output_size(height, width)
    if shape.pointwise:  # one class for all pixels
        borders = vars(weights.borders(1, 1)) | {"row_class": None, "column_class": None}
    else:
        borders = vars(weights.borders(height, width))
    return {
        **vars(signs),
        **vars(extras),
        **borders,
        "magnitudes": None if weights.scale_filter is None else signs.magnitudes,
        "weights": weights.words,
        "scale_filter": weights.scale_filter,
        "weight_scale": weights.weight_scale,
        "bias": weights.bias,
        **{f"plane_scale_{i}": scale for i, scale in enumerate(weights.plane_scales, 1)},
        "shortcut_channels": 0 if extras.shortcut is None else extras.shortcut.shape[-1],
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
    """1 if neighbouring channels may be read at once: even widths, and addresses that allow it."""
    large = [t for t in (extras.shortcut, extras.residual) if t is not None]
    even = all(t.shape[-1] % 2 == 0 and t.data_ptr() % (2 * t.element_size()) == 0 for t in large)
    return int(out_channels % 2 == 0 and even)


def _launch_popc(launcher: Launcher, fields: dict[str, Field], size: ConvSize, dtype: torch.dtype) -> None:
    pixels = size.images * size.height * size.width
    grid = (-(-pixels // _POPC_TILE), -(-size.filters // _POPC_TILE))
    kernel = Kernel("conv_popc.cu", "conv_popc", "ConvArgs", dtype, (("PLANES", size.planes),))
    words = (size.planes + 1) * 16 * (_POPC_TILE + 4)
    shared = 4 * words + terms_bytes(size.planes) * _POPC_TILE + 4 * _POPC_TILE**2
    launcher.launch(kernel, grid, fields, shared)


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
        ("PLANES", size.planes),
    )
    kernel = Kernel("conv_bmma.cu", "conv_bmma", "ConvArgs", dtype, macros)
    box = {"tile_images": tile.images, "tile_rows": tile.rows, "tile_columns": tile.columns}
    launcher.launch(kernel, grid, fields | box, tile.shared_memory(size))


def _classes(
    outputs: int, stride: int, padding: int, taps: int, size: int
) -> tuple[list[tuple[bool, ...]], Tensor]:
    """Classes of output positions along an axis by the taps inside it, and each position's class, int32."""
    inside = [tuple(0 <= i * stride - padding + tap < size for tap in range(taps)) for i in range(outputs)]
    classes = sorted(set(inside))
    return classes, torch.tensor([classes.index(position) for position in inside], dtype=torch.int32)
