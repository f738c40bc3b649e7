"""Weights of a packed layer in the layout of the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.cpu.codegen.isa import Tile
from bidm_cli.packed.format.bits import WORD, weight_words, words_per_tap
from bidm_cli.packed.tensors import LayerTensors


@dataclass
class CpuWeights:
    """Weights of a packed layer in the layout of the CPU kernels; filters padded to whole groups of the tile.

    Attributes:
        words: int32 [groups, kh kw ceil(C / 32), filters per tile], or by byte of a word, uint8 [groups,
            kh kw ceil(C / 32), 4, filters per tile], for tiles that count pairs; for a matrix unit uint8
            [groups, kh kw ceil(C / 64), 2, 16, 8], the last two axes 4 channels, and of 2 filters 4 bits
            each.
        tap_bits: int64 [kh kw, padded filters], popcount of each tap of each filter.
        weight_scale, bias: float32 [padded filters]. limits: float32 [32 ceil(C / 32)], -tau.
        plane_offset: float32 [planes - 1, 32 ceil(C / 32)], delta. plane_scale: float32 [planes - 1], g.
            None with one plane.
        scale_filter: float32 [kh, kw] or None. shortcut_scale: |s|, 0 without a shortcut.
        shortcut_conv: True if P(I) has a float convolution of its own.
    """

    geometry: LayerGeometry
    tile: Tile
    words: Tensor
    tap_bits: Tensor
    limits: Tensor
    plane_offset: Tensor | None
    plane_scale: Tensor | None
    weight_scale: Tensor
    bias: Tensor
    scale_filter: Tensor | None
    shortcut_scale: float
    shortcut_conv: bool
    corrections: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        words: Tensor,
        geometry: LayerGeometry,
        tile: Tile,
        *,
        threshold: Tensor | None = None,
        plane_offset: Tensor | None = None,
        plane_scale: Tensor | None = None,
        weight_scale: Tensor | None = None,
        bias: Tensor | None = None,
        scale_filter: Tensor | None = None,
        shortcut_scale: Tensor | None = None,
        shortcut_conv: bool = False,
    ) -> CpuWeights:
        """Lay out int32 words [O, kh kw, ceil(C / 32)] and the layer's float tensors."""
        o = geometry.out_channels
        padded = -(-o // tile.filters) * tile.filters

        def per_filter(values: Tensor | None, absent: float) -> Tensor:
            full = torch.full((padded,), absent, dtype=torch.float32)
            if values is not None:
                full[:o] = values
            return full

        filled = torch.zeros((padded, *words.shape[1:]), dtype=torch.int32)
        filled[:o] = words
        c, lanes = geometry.in_channels, words_per_tap(geometry.in_channels) * WORD
        limits = torch.full((lanes,), torch.inf)
        limits[:c] = 0.0 if threshold is None else -threshold
        counted = np.bitwise_count(filled.numpy().view(np.uint32)).sum(axis=-1, dtype=np.int64)
        return cls(
            geometry=geometry,
            tile=tile,
            words=_arranged(filled, tile),
            tap_bits=torch.from_numpy(counted).T.contiguous(),
            limits=limits,
            plane_offset=None if plane_offset is None else F.pad(plane_offset.float(), (0, lanes - c)),
            plane_scale=None if plane_scale is None else plane_scale.float().contiguous(),
            weight_scale=per_filter(weight_scale, 1.0),
            bias=per_filter(bias, 0.0),
            scale_filter=None if scale_filter is None else scale_filter.float().contiguous(),
            shortcut_scale=0.0 if shortcut_scale is None else float(shortcut_scale.abs()),
            shortcut_conv=shortcut_conv,
        )

    @classmethod
    def of(cls, layer: LayerTensors, tile: Tile) -> CpuWeights:
        """From a packed layer's tensors."""
        tensors = layer.epilogue()
        shortcut_conv = tensors.pop("shortcut_weight") is not None
        tensors |= {name: getattr(layer, name) for name in ("threshold", "plane_offset", "plane_scale")}
        words = weight_words(layer.weight_bits, layer.geometry)
        return cls.make(words, layer.geometry, tile, shortcut_conv=shortcut_conv, **tensors)

    @property
    def planes(self) -> int:
        """Activation planes."""
        return 1 if self.plane_scale is None else 1 + len(self.plane_scale)

    def corrections_for(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Zero-padding corrections: bits inside + 2 popcount(taps outside); for a matrix unit the sum of s
            over taps inside, bits - 2 popcount.

            ``rows`` and ``columns`` are masks: bit d is set if kernel row (column) d is inside the image.
        Returns int32 [len(rows) * len(columns), padded filters].
        """
        key = (tuple(rows), tuple(columns))
        if key not in self.corrections:
            kh, kw = self.geometry.kernel
            inside = torch.tensor(
                [
                    [bool(r >> dy & 1 and c >> dx & 1) for dy in range(kh) for dx in range(kw)]
                    for r in rows
                    for c in columns
                ]
            ).long()
            table = inside.sum(1, keepdim=True) * self.geometry.in_channels
            counted = -inside if self.tile.multiplies else 1 - inside
            table = table + 2 * counted @ self.tap_bits
            self.corrections[key] = table.int().contiguous()
        return self.corrections[key]


def _arranged(words: Tensor, tile: Tile) -> Tensor:
    """Words of filters int32 [padded filters, kh kw, ceil(C / 32)] as :attr:`CpuWeights.words`."""
    if tile.multiplies:
        return _in_tiles(words)
    grouped = words.reshape(-1, tile.filters, words[0].numel()).transpose(1, 2).contiguous()
    if tile.pairs:
        grouped = grouped.view(torch.uint8).unflatten(-1, (-1, 4)).transpose(-1, -2).contiguous()
    return grouped


def _in_tiles(words: Tensor) -> Tensor:
    """The same for a matrix unit: in a row of a tile 4 channels of each of 16 filters."""
    octets = F.pad(words, (0, words.shape[2] % 2)).flatten(1).view(torch.uint8)
    # [groups, tiles, pairs of filters, 2, steps, 8]
    octets = octets.reshape(-1, 2, 8, 2, octets.shape[1] // 8, 8)
    first, second = octets.unbind(3)
    low = (first & 15) | (second << 4)
    high = (first >> 4) | (second & 240)
    return torch.stack((low, high), -1).flatten(-2).permute(0, 3, 1, 4, 2).contiguous()
