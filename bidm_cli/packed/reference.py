"""The torch backend: the readable truth, on any device, and the float simulation of a packed network.

It computes in floats with weights of +1 and -1. Sums of signs are whole numbers below 2^24, which float32
adds without rounding in any order, so its integers are exact; whole layers go through
:func:`bidm_cli.binary.functional.forward`, the code that training runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bidm_cli.binary import functional
from bidm_cli.binary.sign import sign
from bidm_cli.binary.spec import LayerGeometry
from bidm_cli.packed.bits import from_words, to_words, unpack_bits

if TYPE_CHECKING:
    from bidm_cli.packed.modules import PackedLayer


def _signs(words: Tensor, channels: int) -> Tensor:
    return from_words(words, channels).float() * 2 - 1


class TorchBackend:
    """See :class:`bidm_cli.packed.ops.Backend`."""

    name = "torch"

    def binarize_pack(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        shifted = x if threshold is None else x + threshold
        return to_words(shifted >= 0), x.abs().sum(dim=-1)

    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        x = _signs(words, geometry.in_channels).permute(0, 3, 1, 2)
        w = _signs(weights, geometry.in_channels).unflatten(1, geometry.kernel).permute(0, 3, 1, 2)
        # round: convolution algorithms of other devices may add in halves.
        return functional.convolve(x, w, geometry).round().int().permute(0, 2, 3, 1)

    def binary_linear(self, words: Tensor, weights: Tensor, channels: int) -> Tensor:
        return (_signs(words, channels) @ _signs(weights, channels).T).round().int()

    def run(self, layer: PackedLayer, x: Tensor) -> Tensor:
        signs = layer.prepared(f"signs {x.device}", lambda: unpack_bits(layer.weight_bits, layer.geometry))
        conv1d = layer.geometry.kind == "conv1d"
        if conv1d:
            x, signs = x.unsqueeze(2), signs.unsqueeze(2)
        y = functional.forward(
            x,
            self._activation(layer, x),
            signs,
            layer.geometry,
            scale_filter=layer.scale_filter,
            weight_scale=layer.weight_scale,
            bias=layer.bias,
            shortcut_scale=layer.shortcut_scale,
            shortcut_weight=layer.shortcut_weight,
        )
        return y.squeeze(2) if conv1d else y

    @staticmethod
    def _activation(layer: PackedLayer, x: Tensor) -> Tensor:
        if layer.spec.activations == "float":
            return x
        if layer.threshold is not None:
            shape = (-1,) if layer.geometry.kind == "linear" else (-1, 1, 1)
            x = x + layer.threshold.reshape(shape)
        return sign(x)

    def kernel(self, geometry: LayerGeometry) -> str:
        return "torch float convolution of +1 and -1"
