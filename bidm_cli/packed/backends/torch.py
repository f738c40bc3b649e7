"""Torch backend: the reference on any device, and the float simulation of a packed network.

It computes in floats with weights of +1 and -1. Sums of signs are whole numbers below 2^24, which float32
adds without rounding in any order, so its integers are exact; whole layers go through
:func:`bidm_cli.binary.functional.forward`, the code that training runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.binary import functional
from bidm_cli.binary.attention import binary_attention
from bidm_cli.binary.planes import sign_planes
from bidm_cli.binary.sign import sign
from bidm_cli.networks.fusion import NOTHING, Features, Fused, Prologue, joined, upsampled
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.format.bits import unpack_bits
from bidm_cli.packed.tensors import LayerTensors
from bidm_cli.packed.uses import Products


class TorchBackend:
    """See :class:`bidm_cli.packed.backend.Backend`; the others fall back to it."""

    name, channels_last, reads_virtual = "torch", False, False

    def fuses(self, prologue: Prologue | None) -> bool:
        return True

    def run(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        x, offset = self._input(x, fused), fused.offset
        signs = layer.prepared(f"signs {x.device}", lambda: unpack_bits(layer.weight_bits, layer.geometry))
        conv1d = layer.geometry.kind == "conv1d"
        if conv1d:
            x, signs = x.unsqueeze(2), signs.unsqueeze(2)
        planes = [x] if layer.spec.activations == "float" else _planes(layer, x)
        y = functional.forward(
            x, planes, signs, layer.geometry, plane_scale=layer.plane_scale, **layer.epilogue()
        )
        y = y.squeeze(2) if conv1d else y
        if offset is not None:
            y = y + offset.reshape(*offset.shape, *[1] * (y.dim() - 2))
        return y if fused.residual is None else fused.residual + y

    def signs(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        planes = _planes(layer, self._input(x, fused))
        return torch.stack(planes) > 0 if len(planes) > 1 else planes[0] > 0

    def _input(self, x: Features, fused: Fused) -> Tensor:
        x = joined(x)
        return upsampled(x if fused.prologue is None else self.normalize(x, fused.prologue), fused.upsample)

    def normalize(self, x: Tensor, prologue: Prologue) -> Tensor:
        norm = prologue.norm
        if isinstance(norm, nn.GroupNorm):
            x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        else:
            x = norm(x)
        if prologue.scale is not None and prologue.shift is not None:
            shape = (*prologue.scale.shape, *[1] * (x.dim() - 2))
            x = x * (1 + prologue.scale.reshape(shape)) + prologue.shift.reshape(shape)
        return F.silu(x) if prologue.silu else x

    def convolves(self, conv: nn.Conv2d) -> bool:
        return False

    def convolve(self, conv: nn.Conv2d, x: Tensor, fused: Fused = NOTHING) -> Tensor:
        y = F.conv2d(self._input(x, fused), conv.weight, conv.bias, conv.stride, conv.padding)
        if fused.offset is not None:
            y = y + fused.offset[:, :, None, None]
        return y if fused.residual is None else fused.residual + y

    def blend(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        beta = betas.to(new.dtype).reshape(-1, *[1] * (new.dim() - 1))
        return (1 - beta) * new + beta * old

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, products: Products = "float32"
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def binary_attention(
        self, q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
    ) -> Tensor:
        return binary_attention(q, k, v, sign(q), sign(k), score_scale, scale)

    def kernel(self, geometry: LayerGeometry) -> str:
        return "torch float convolution of +1 and -1"


def _planes(layer: LayerTensors, x: Tensor) -> list[Tensor]:
    """Activation planes of x [N, C, ...] or, of a linear layer, [..., C]."""
    shape = (-1, *[1] * (0 if layer.geometry.kind == "linear" else x.dim() - 2))
    z = x if layer.threshold is None else x + layer.threshold.reshape(shape)
    offsets = () if layer.plane_offset is None else [row.reshape(shape) for row in layer.plane_offset]
    return sign_planes(z, offsets, sign)
