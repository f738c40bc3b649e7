"""The cupy backend: packed layers on NVIDIA GPUs, in integers, by the kernels of :mod:`cupy_kernels`.

Activations are float32, float16 or bfloat16 with the channels last, and the result has the input's type.
Whatever the type, signs and counts are exact, and the arithmetic of norms and epilogues is float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.binary import functional
from bidm_cli.errors import BidmError
from bidm_cli.networks.fusion import Features, Prologue, joined, upsampled
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.backends.layout import channels_last, restore_layout
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.format.bits import from_words, weight_words
from bidm_cli.packed.tensors import LayerTensors
from cupy_kernels.compiler import CompileError
from cupy_kernels.conv import ConvShape, ConvWeights, EpilogueInputs, convolve, tile_for
from cupy_kernels.kernel import ACTIVATIONS, Launcher
from cupy_kernels.signs import Norm, Signs, norm_pack, normalize, pack
from cupy_kernels.tiles import ConvSize


def why_not() -> str:
    """Why this machine cannot run the kernels, and the way out; empty if it can."""
    from cupy_kernels.cuda import why_not

    return why_not()


@functools.cache
def _device_launcher(index: int) -> Launcher:
    from cupy_kernels.cuda import CudaLauncher

    return CudaLauncher(index)


class CupyBackend:
    """See :class:`bidm_cli.packed.backend.Backend`.

    Args:
        launcher: runs the kernels; by default that of each tensor's device.
    """

    name, channels_last, reads_virtual = "cupy", True, False

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._given = launcher
        self._floats = TorchBackend()

    def launcher(self, device: torch.device) -> Launcher:
        """What runs the kernels for tensors on ``device``."""
        if self._given is not None:
            return self._given
        return _device_launcher(torch.cuda.current_device() if device.index is None else device.index)

    def fuses(self, prologue: Prologue | None) -> bool:
        return prologue is None or isinstance(prologue.norm, nn.GroupNorm)

    def run(
        self,
        layer: LayerTensors,
        x: Features,
        prologue: Prologue | None = None,
        upsample: int = 1,
        offset: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        kind = layer.geometry.kind
        x, prologue = self._input(x, prologue, upsample)
        if layer.spec.activations == "float" or (kind == "linear" and prologue is not None):
            x = x if prologue is None else self.normalize(x, prologue)
            return self._run_floats(layer, x, offset, residual)
        with _readable_errors():
            inside = channels_last(_typed(x), kind)
            signs, values = self._signs(layer, inside, prologue, layer.shortcut_scale is not None)
            shortcut, scale = _shortcut(layer, values)
            extras = EpilogueInputs(
                shortcut,
                scale,
                offset=None if offset is None else offset.to(inside.dtype).contiguous(),
                residual=None if residual is None else channels_last(residual.to(inside.dtype), kind),
            )
            weights = layer.prepared("cuda weights", lambda: _weights(layer))
            out = convolve(self.launcher(x.device), signs, weights, inside.dtype, extras)
        return restore_layout(out, kind, x)

    def _input(self, x: Features, prologue: Prologue | None, upsample: int) -> tuple[Tensor, Prologue | None]:
        """One tensor, and the prologue that is still to come: the kernels read no virtual inputs."""
        x = joined(x)
        if upsample == 1 or prologue is None:
            return upsampled(x, upsample), prologue
        return upsampled(self.normalize(x, prologue), upsample), None

    def _run_floats(
        self, layer: LayerTensors, x: Tensor, offset: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """1-bit weights with float activations: torch's, in float32."""
        extras = (None if extra is None else extra.float() for extra in (offset, residual))
        return self._floats.run(layer, x.float(), None, 1, *extras).to(x.dtype)

    def _signs(
        self, layer: LayerTensors, x: Tensor, prologue: Prologue | None, keep: bool
    ) -> tuple[Signs, Tensor | None]:
        """Packed signs of the layer's input x [N, H, W, C], and the input itself, if ``keep``."""
        launcher = self.launcher(x.device)
        threshold = layer.prepared("cuda threshold", lambda: _float(layer.threshold))
        scaled = layer.scale_filter is not None
        if prologue is None:
            return pack(launcher, x, threshold, magnitudes=scaled), x
        return norm_pack(launcher, x, _norm(prologue, x), threshold, magnitudes=scaled, keep=keep)

    def signs(
        self, layer: LayerTensors, x: Features, prologue: Prologue | None = None, upsample: int = 1
    ) -> Tensor:
        x, prologue = self._input(x, prologue, upsample)
        inside = channels_last(_typed(x), layer.geometry.kind)
        with _readable_errors():
            packed = self._signs(layer, inside, prologue, keep=False)[0]
        return restore_layout(from_words(packed.words, inside.shape[-1]), layer.geometry.kind, x)

    def normalize(self, x: Tensor, prologue: Prologue) -> Tensor:
        if x.dim() not in (3, 4):
            return self._floats.normalize(x, prologue)
        kind = "conv2d" if x.dim() == 4 else "conv1d"
        inside = channels_last(_typed(x), kind)
        with _readable_errors():
            return restore_layout(
                normalize(self.launcher(x.device), inside, _norm(prologue, inside)), kind, x
            )

    def blend(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        return torch.lerp(new, old, betas.to(new.dtype).reshape(-1, *[1] * (new.dim() - 1)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def binary_attention(
        self, q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
    ) -> Tensor:
        # The reference's formula: on tensor cores torch's fused attention over scaled signs is hard to beat.
        return self._floats.binary_attention(q, k, v, score_scale.to(q.dtype), scale)

    def kernel(self, geometry: LayerGeometry) -> str:
        launcher = self.launcher(torch.device("cuda"))
        shape = _shape(geometry)
        # For an output of middling size; with another one the tile may be another.
        size = ConvSize(shape.words, shape.kernel, shape.stride, 16, 32, 32, shape.out_channels)
        tile = tile_for(launcher, size)
        if tile is None:
            return "CUDA cores: 64 pixels x 64 filters a block"
        emulated = "" if launcher.capability // 10 in (8, 9) else " (emulated by this GPU)"
        return f"binary tensor cores{emulated}: 128 pixels x {tile.filters} filters a block"


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn what a user can mend into a BidmError."""
    try:
        yield
    except CompileError as error:
        line = str(error).splitlines()[0]
        raise BidmError(f"the CUDA kernels cannot be compiled: {line}; use --backend torch") from error


def _shape(geometry: LayerGeometry) -> ConvShape:
    return ConvShape(
        geometry.in_channels, geometry.out_channels, geometry.kernel, geometry.stride, geometry.padding
    )


def _weights(layer: LayerTensors) -> ConvWeights:
    """A layer's tensors as the kernels want them."""
    return ConvWeights(
        _shape(layer.geometry),
        weight_words(layer.weight_bits, layer.geometry).contiguous(),
        scale_filter=_float(layer.scale_filter),
        weight_scale=_float(layer.weight_scale),
        bias=_float(layer.bias),
    )


def _shortcut(layer: LayerTensors, x: Tensor | None) -> tuple[Tensor | None, float]:
    """P(I) of I [N, H, W, C] but for the number of channels, which the kernel changes; and |s|."""
    if layer.shortcut_scale is None or x is None:
        return None, 0.0
    stored = layer.shortcut_scale
    # Read back from the device at the layer's first run, never again.
    scale = layer.prepared("cuda shortcut scale", lambda: float(stored.abs()))
    geometry, weight = layer.geometry, layer.shortcut_weight
    size = geometry.output_size(x.shape[1], x.shape[2])
    same_pixels = geometry.stride == (1, 1) and size == x.shape[1:3]
    if weight is not None:
        lifted = x if geometry.kind == "linear" else x.permute(0, 3, 1, 2)
        weight = layer.prepared(f"cuda shortcut {x.dtype}", lambda: layer.shortcut_weight.to(x.dtype))  # type: ignore[union-attr]
        x = functional.shortcut(lifted, geometry, size, weight)
        x = x if geometry.kind == "linear" else x.permute(0, 2, 3, 1)
    elif not same_pixels:
        x = functional.resize_to(x.permute(0, 3, 1, 2), geometry, size).permute(0, 2, 3, 1)
    return x.contiguous(), scale


def _norm(prologue: Prologue, x: Tensor) -> Norm:
    def film(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(x.dtype).contiguous()

    norm = prologue.norm
    assert isinstance(norm, nn.GroupNorm)
    return Norm(
        groups=norm.num_groups,
        epsilon=norm.eps,
        gamma=_float(norm.weight),
        beta=_float(norm.bias),
        scale=film(prologue.scale),
        shift=film(prologue.shift),
        silu=prologue.silu,
    )


def _typed(x: Tensor) -> Tensor:
    return x if x.dtype in ACTIVATIONS else x.float()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
