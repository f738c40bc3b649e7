"""Exact operations under a packed layer (packing, integer convolution), of the reference and of each kernel.

    words, sums = REFERENCE.binarize_pack(x, threshold)  # x [..., C] -> int32 [..., ceil(C / 32)], [...]
    integers = NumbaOps().binary_conv2d(words, weights, geometry)       # channels last, int32
    signs, dots = REFERENCE.planes_conv2d(x, threshold, offsets, scales, weights, geometry)

Words are as :mod:`bidm_cli.packed.format.bits` lays them out: bit 1 where x >= -tau, NaN gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.binary import functional
from bidm_cli.binary.planes import plane_sum, sign_planes
from bidm_cli.binary.sign import sign
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.cpu.codegen.isa import Tile, tiles_for
from bidm_cli.packed.cpu.ops.conv import ConvPlan
from bidm_cli.packed.cpu.ops.weights import CpuWeights
from bidm_cli.packed.format.bits import from_words, to_words
from cupy_kernels.conv import ConvShape, ConvWeights, convolve
from cupy_kernels.kernel import Launcher
from cupy_kernels.signs import Signs, pack


class ReferenceOps:
    """In torch, in floats of +1 and -1."""

    def binarize_pack(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        shifted = x if threshold is None else x + threshold
        return to_words(shifted >= 0), x.abs().sum(dim=-1)

    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        """words [N, H, W, .], weights [O, kh kw, .] -> D int32 [N, H', W', O]."""
        x = _signs(words, geometry.in_channels).permute(0, 3, 1, 2)
        w = _signs(weights, geometry.in_channels).unflatten(1, geometry.kernel).permute(0, 3, 1, 2)
        # round: convolution algorithms of other devices may add in halves.
        return functional.convolve(x, w, geometry).round().int().permute(0, 2, 3, 1)

    def planes_conv2d(
        self,
        x: Tensor,
        threshold: Tensor,
        offsets: Tensor,
        scales: Tensor,
        weights: Tensor,
        geometry: LayerGeometry,
    ) -> tuple[Tensor, Tensor]:
        """x [N, H, W, C], offsets [planes - 1, C], scales [planes - 1] -> signs bool [planes, N, H, W, C] and
        D_1 + g_1 D_2 + ... [N, H', W', O]."""
        planes = sign_planes(x + threshold, list(offsets), sign)
        dots = [self.binary_conv2d(to_words(plane > 0), weights, geometry).float() for plane in planes]
        return torch.stack(planes) > 0, plane_sum(dots, scales)

    def binary_linear(self, words: Tensor, weights: Tensor, channels: int) -> Tensor:
        """words [..., .], weights [O, .] -> D int32 [..., O]."""
        return (_signs(words, channels) @ _signs(weights, channels).T).round().int()


REFERENCE = ReferenceOps()


def _signs(words: Tensor, channels: int) -> Tensor:
    return from_words(words, channels).float() * 2 - 1


class _KernelOps:
    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        raise NotImplementedError

    def binary_linear(self, words: Tensor, weights: Tensor, channels: int) -> Tensor:
        """By the kernel's convolution, as whole layers are."""
        geometry = LayerGeometry("linear", channels, len(weights))
        rows = words.reshape(1, 1, -1, words.shape[-1])
        return self.binary_conv2d(rows, weights[:, None], geometry).reshape(*words.shape[:-1], -1)


class NumbaOps(_KernelOps):
    """By the CPU kernels, in one form of the inner loop."""

    def __init__(self, tile: Tile | None = None) -> None:
        self.tile = tile

    def binarize_pack(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        c = x.shape[-1]
        geometry = LayerGeometry("linear", c, 1)
        no_weights = torch.zeros(1, 1, -(-c // 32), dtype=torch.int32)
        filters = {"threshold": threshold, "scale_filter": torch.ones(1, 1)}
        weights = CpuWeights.make(no_weights, geometry, self.tile or tiles_for(geometry)[0], **filters)
        plan = ConvPlan(weights, (1, 1, x.numel() // c))
        plan.pack((x.float().contiguous(),))
        sums = plan.sums.reshape(x.shape[:-1]) * c
        return to_words(plan.signs()[0]).reshape(*x.shape[:-1], -1), sums

    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        n, height, width, _ = words.shape
        filters = CpuWeights.make(weights, geometry, self.tile or tiles_for(geometry)[0])
        plan = ConvPlan(filters, (n, height, width))
        if plan.bits.dtype == torch.uint8:
            plan.bits[plan.inside][..., : 32 * words.shape[-1]] = from_words(words, 32 * words.shape[-1])
        else:
            plan.bits[plan.inside] = words
        out = torch.empty(n, *plan.out_size, geometry.out_channels)
        plan.convolve(out)
        return out.int()

    def planes_conv2d(
        self,
        x: Tensor,
        threshold: Tensor,
        offsets: Tensor,
        scales: Tensor,
        weights: Tensor,
        geometry: LayerGeometry,
    ) -> tuple[Tensor, Tensor]:
        tile = self.tile or tiles_for(geometry)[0]
        parts = {"threshold": threshold, "plane_offset": offsets, "plane_scale": scales}
        plan = ConvPlan(CpuWeights.make(weights, geometry, tile, **parts), tuple(x.shape[:3]))
        plan.pack((x,))
        out = torch.empty(len(x), *plan.out_size, geometry.out_channels)
        plan.convolve(out)
        return plan.signs(), out


class CudaOps(_KernelOps):
    """By the CUDA kernels."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def binarize_pack(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        signs = pack(self.launcher, x.contiguous(), threshold)
        assert signs.magnitudes is not None
        return signs.words[..., 0, :], signs.magnitudes * x.shape[-1]

    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        words = words.unsqueeze(-2).contiguous()  # of one plane
        counts = from_words(words, 32 * words.shape[-1]).sum(dim=-1, dtype=torch.int32)
        g = geometry
        shape = ConvShape(g.in_channels, g.out_channels, g.kernel, g.stride, g.padding)
        signs, layer = Signs(words, counts, None), ConvWeights(shape, weights.contiguous())
        return convolve(self.launcher, signs, layer, torch.float32, integers=True)
