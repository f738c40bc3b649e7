"""The cupy backend: packed layers on NVIDIA GPUs, in integers, by the kernels of :mod:`cupy_kernels`.

Activations are float32, float16 or bfloat16 with the channels last, and the result has the input's type. Whatever
the type, signs, counts and the arithmetic of the epilogue are float32 and int32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bidm_cli.binary import functional
from bidm_cli.binary.spec import LayerGeometry
from bidm_cli.errors import BidmError
from bidm_cli.packed.bits import weight_words
from bidm_cli.packed.reference import TorchBackend
from cupy_kernels.compiler import CompileError
from cupy_kernels.conv import ConvShape, ConvWeights, Extras, convolve, tile_for
from cupy_kernels.kernel import ACTIVATIONS, Launcher
from cupy_kernels.signs import Signs, pack
from cupy_kernels.tiles import ConvSize

if TYPE_CHECKING:
    from bidm_cli.packed.modules import PackedLayer


def why_not() -> str:
    """Why this machine cannot run the kernels, and the way out; empty if it can."""
    from cupy_kernels.cuda import why_not

    return why_not()


@functools.cache
def _device_launcher(index: int) -> Launcher:
    from cupy_kernels.cuda import CudaLauncher

    return CudaLauncher(index)


class CupyBackend:
    """See :class:`bidm_cli.packed.ops.Backend`.

    Args:
        launcher: runs the kernels; by default that of each tensor's device.
    """

    name = "cupy"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._given = launcher
        self._floats = TorchBackend()

    def launcher(self, device: torch.device) -> Launcher:
        """What runs the kernels for tensors on ``device``."""
        if self._given is not None:
            return self._given
        index = torch.cuda.current_device() if device.index is None else device.index
        return _device_launcher(index)

    def binarize_pack(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        signs = pack(self.launcher(x.device), _typed(x).contiguous(), threshold, divisor=1.0)
        assert signs.magnitudes is not None
        return signs.words, signs.magnitudes

    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        signs = Signs(words.contiguous(), _popcounts(words), None)
        layer = ConvWeights(conv_shape(geometry), weights.contiguous())
        return convolve(self.launcher(words.device), signs, layer, torch.float32, integers=True)

    def binary_linear(self, words: Tensor, weights: Tensor, channels: int) -> Tensor:
        geometry = LayerGeometry("linear", channels, len(weights))
        rows = words.reshape(1, 1, -1, words.shape[-1])
        return self.binary_conv2d(rows, weights[:, None], geometry).reshape(*words.shape[:-1], -1)

    def run(self, layer: PackedLayer, x: Tensor) -> Tensor:
        """A whole layer; x and the result may also be float16 or bfloat16.

        Raises:
            BidmError: a kernel cannot be compiled.
        """
        if layer.spec.activations == "float":
            return self._floats.run(layer, x.float()).to(x.dtype)
        try:
            return _like_input(layer.geometry.kind, _typed(x), functools.partial(self._run, layer))
        except CompileError as error:
            line = str(error).splitlines()[0]
            raise BidmError(f"the CUDA kernels cannot be compiled: {line}; use --backend torch") from error

    def _run(self, layer: PackedLayer, x: Tensor) -> Tensor:
        """Channels last in and out: [N, H, W, C] -> [N, H', W', O]."""
        launcher = self.launcher(x.device)
        weights = self._weights(layer)
        threshold = layer.prepared("cuda threshold", lambda: _float(layer.threshold))
        signs = pack(launcher, x, threshold, magnitudes=weights.scale_filter is not None)
        return convolve(launcher, signs, weights, x.dtype, shortcut_of(layer, x))

    def _weights(self, layer: PackedLayer) -> ConvWeights:
        return layer.prepared("cuda weights", lambda: weights_of(layer))

    def kernel(self, geometry: LayerGeometry) -> str:
        launcher = self.launcher(torch.device("cuda"))
        shape = conv_shape(geometry)
        # A middling output: the choice hardly depends on it.
        size = ConvSize(shape.words, shape.kernel, shape.stride, 16, 32, 32, shape.out_channels)
        tile = tile_for(launcher, size)
        if tile is None:
            return "CUDA cores (popc): 64 pixels x 64 filters a block"
        emulated = "" if launcher.capability // 10 in (8, 9) else " (emulated on this GPU)"
        return f"binary tensor cores{emulated}: 128 pixels x {tile.filters} filters a block"


def conv_shape(geometry: LayerGeometry) -> ConvShape:
    """A layer's geometry as the kernels know it."""
    return ConvShape(
        geometry.in_channels, geometry.out_channels, geometry.kernel, geometry.stride, geometry.padding
    )


def weights_of(layer: PackedLayer) -> ConvWeights:
    """A layer's tensors as the kernels want them."""
    scale = layer.scale_filter
    return ConvWeights(
        conv_shape(layer.geometry),
        weight_words(layer.weight_bits, layer.geometry).contiguous(),
        scale_filter=None if scale is None else scale.float().contiguous(),
        weight_scale=_float(layer.weight_scale),
        bias=_float(layer.bias),
    )


def shortcut_of(layer: PackedLayer, x: Tensor) -> Extras:
    """|s| P(I) for x [N, H, W, C], as far as the kernel does not do it itself: it repeats and averages channels."""
    if layer.shortcut_scale is None:
        return Extras()
    # Read back from the device once a layer, never in a step.
    scale = layer.prepared("cuda shortcut scale", lambda: float(layer.shortcut_scale.abs()))  # type: ignore[union-attr]
    geometry, weight = layer.geometry, layer.shortcut_weight
    size = geometry.output_size(x.shape[1], x.shape[2])
    if weight is None and geometry.stride == (1, 1) and size == (x.shape[1], x.shape[2]):
        return Extras(shortcut=x, shortcut_scale=scale)
    value = x if geometry.kind == "linear" else x.permute(0, 3, 1, 2)
    if weight is not None:
        value = functional.shortcut(value, geometry, size, weight.to(x.dtype))
    else:
        value = functional.resize_to(value, geometry, size)
    value = value if geometry.kind == "linear" else value.permute(0, 2, 3, 1)
    return Extras(shortcut=value.contiguous(), shortcut_scale=scale)


def _like_input(kind: str, x: Tensor, run: functools.partial[Tensor]) -> Tensor:
    """Apply ``run`` ([N, H, W, C] -> [N, H', W', O]) to an input of a layer's kind, and give its layout back."""
    if kind == "linear":
        return run(x.contiguous().reshape(1, 1, -1, x.shape[-1])).reshape(*x.shape[:-1], -1)
    if kind == "conv1d":
        return run(x.transpose(1, 2).contiguous()[:, None])[:, 0].transpose(1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    return run(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def _typed(x: Tensor) -> Tensor:
    return x if x.dtype in ACTIVATIONS else x.float()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _popcounts(words: Tensor) -> Tensor:
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).sum(dim=(-1, -2), dtype=torch.int32)
