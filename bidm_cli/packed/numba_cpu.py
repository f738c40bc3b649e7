"""The numba backend: packed layers on the CPU, in integers, by the kernels of :mod:`bidm_cli.packed.cpu`.

Activations are float32 with the channels last: a convolution takes and gives channels_last tensors (others
are converted first), so that a network stays in that layout once it is in it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bidm_cli.binary import functional
from bidm_cli.binary.spec import LayerGeometry
from bidm_cli.packed.bits import weight_words
from bidm_cli.packed.cpu.isa import TILES, instruction_set
from bidm_cli.packed.cpu.plan import ConvPlan, CpuWeights
from bidm_cli.packed.reference import TorchBackend

if TYPE_CHECKING:
    from bidm_cli.packed.modules import PackedLayer


class NumbaBackend:
    """See :class:`bidm_cli.packed.ops.Backend`."""

    name = "numba"

    def __init__(self) -> None:
        self.tile = TILES[instruction_set()]
        self._floats = TorchBackend()

    def binarize_pack(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        c = x.shape[-1]
        geometry = LayerGeometry("linear", c, 1)
        no_weights = torch.zeros(1, 1, -(-c // 32), dtype=torch.int32)
        weights = CpuWeights.make(
            no_weights, geometry, self.tile, threshold=threshold, scale_filter=torch.ones(1, 1)
        )
        plan = ConvPlan(weights, 1, 1, x.numel() // c)
        plan.pack(x.contiguous())
        sums = plan.sums.reshape(x.shape[:-1]) * c
        return plan.bits.reshape(*x.shape[:-1], -1).clone(), sums

    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        n, height, width, _ = words.shape
        plan = ConvPlan(CpuWeights.make(weights, geometry, self.tile), n, height, width)
        plan.bits[plan.inside] = words
        out = torch.empty(n, *plan.out_size, geometry.out_channels)
        plan.convolve(out)
        return out.int()

    def binary_linear(self, words: Tensor, weights: Tensor, channels: int) -> Tensor:
        geometry = LayerGeometry("linear", channels, len(weights))
        rows = words.reshape(1, 1, -1, words.shape[-1])
        return self.binary_conv2d(rows, weights[:, None], geometry).reshape(*words.shape[:-1], -1)

    def run(self, layer: PackedLayer, x: Tensor) -> Tensor:
        if layer.spec.activations == "float":
            return self._floats.run(layer, x)
        kind = layer.geometry.kind
        x = x.float()
        if kind == "linear":
            y = self._run(layer, x.contiguous().reshape(1, 1, -1, x.shape[-1]))
            return y.reshape(*x.shape[:-1], -1)
        if kind == "conv1d":
            return self._run(layer, x.transpose(1, 2).contiguous()[:, None])[:, 0].transpose(1, 2)
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return self._run(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _run(self, layer: PackedLayer, x: Tensor) -> Tensor:
        """Channels last in and out: [N, H, W, C] -> [N, H', W', O]."""
        n, height, width, c = x.shape
        plan = layer.prepared(
            f"plan {n} {height} {width} {threading.get_ident()}",
            lambda: ConvPlan(self._weights(layer), n, height, width),
        )
        out = torch.empty(n, *plan.out_size, layer.geometry.out_channels)
        plan.pack(x)
        if layer.shortcut_scale is None:
            plan.convolve(out)
        elif layer.shortcut_weight is None and self._reads_input(layer.geometry, plan, height, width):
            plan.convolve(out, x, c)
        else:
            lifted = x if layer.geometry.kind == "linear" else x.permute(0, 3, 1, 2)
            value = functional.shortcut(lifted, layer.geometry, plan.out_size, layer.shortcut_weight)
            value = value if layer.geometry.kind == "linear" else value.permute(0, 2, 3, 1)
            plan.convolve(out, value.contiguous(), layer.geometry.out_channels)
        return out

    def _reads_input(self, geometry: LayerGeometry, plan: ConvPlan, height: int, width: int) -> bool:
        """Whether P(I) is the input itself, with its channels repeated in whole vectors."""
        c, o = geometry.in_channels, geometry.out_channels
        same_pixels = geometry.stride == (1, 1) and plan.out_size == (height, width)
        return same_pixels and (c == o or (c < o and c % self.tile.lanes == 0))

    def _weights(self, layer: PackedLayer) -> CpuWeights:
        return layer.prepared(
            "cpu weights",
            lambda: CpuWeights.make(
                weight_words(layer.weight_bits, layer.geometry),
                layer.geometry,
                self.tile,
                threshold=layer.threshold,
                weight_scale=layer.weight_scale,
                bias=layer.bias,
                scale_filter=layer.scale_filter,
                shortcut_scale=layer.shortcut_scale,
            ),
        )

    def kernel(self, geometry: LayerGeometry) -> str:
        return f"{instruction_set()}: {self.tile}"
