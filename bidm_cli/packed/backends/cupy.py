"""The cupy backend: packed layers on NVIDIA GPUs, in integers, by the kernels of :mod:`cupy_kernels`.

Activations are float32, float16 or bfloat16 with the channels last, and the result has the input's type.
Whatever the type, signs and counts are exact, and the arithmetic of norms and epilogues is float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bidm_cli.binary import functional
from bidm_cli.errors import BidmError
from bidm_cli.networks.fusion import NOTHING, Features, Fused, Prologue, joined
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.backends.layout import channels_last, restore_layout
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.format.bits import from_words, weight_words
from bidm_cli.packed.tensors import LayerTensors
from cupy_kernels.compiler import CompileError, first_line
from cupy_kernels.conv import ConvShape, ConvWeights, EpilogueInputs, convolve, tile_for
from cupy_kernels.cuda import CudaLauncher
from cupy_kernels.kernel import ACTIVATIONS, Launcher
from cupy_kernels.signs import Norm, Signs, norm_pack, normalize, pack
from cupy_kernels.tiles import ConvSize

_device_launcher = functools.cache(CudaLauncher)


class CupyBackend(TorchBackend):
    """See :class:`bidm_cli.packed.backend.Backend`.

    Args:
        launcher: runs the kernels; by default that of each tensor's device.
    """

    name, channels_last, reads_virtual = "cupy", True, False

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher

    def launcher(self, device: torch.device) -> Launcher:
        """Launcher of the kernels for tensors on ``device``."""
        if self._launcher is not None:
            return self._launcher
        return _device_launcher(torch.cuda.current_device() if device.index is None else device.index)

    def fuses(self, prologue: Prologue | None) -> bool:
        return prologue is None or isinstance(prologue.norm, nn.GroupNorm)

    def run(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        kind, (offset, residual) = layer.geometry.kind, fused[2:]
        if layer.spec.activations == "float" or (kind == "linear" and fused.prologue is not None):
            x = self._input(x, fused)
            floats = (None if extra is None else extra.float() for extra in (offset, residual))
            return super().run(layer, x.float(), Fused(None, 1, *floats)).to(x.dtype)
        x, prologue = self._tensor(x, fused)
        with _readable_errors():
            inside = channels_last(_typed(x), kind)
            signs, values = self._signs(layer, inside, prologue, layer.shortcut_scale is not None)
            extras = EpilogueInputs(
                *_shortcut(layer, values),
                offset=_as(offset, inside.dtype),
                residual=None if residual is None else channels_last(residual.to(inside.dtype), kind),
            )
            weights = layer.prepared("cuda weights", lambda: _weights(layer))
            out = convolve(self.launcher(x.device), signs, weights, inside.dtype, extras)
        return restore_layout(out, kind, x)

    def _tensor(self, x: Features, fused: Fused) -> tuple[Tensor, Prologue | None]:
        """One tensor, and the prologue that is still to come: the kernels read no virtual inputs."""
        if fused.upsample == 1:
            return joined(x), fused.prologue
        return self._input(x, fused), None

    def _signs(
        self, layer: LayerTensors, x: Tensor, prologue: Prologue | None, keep: bool
    ) -> tuple[Signs, Tensor | None]:
        """Packed signs of the layer's input x [N, H, W, C], and the input itself, if ``keep``."""
        launcher = self.launcher(x.device)
        thresholds = layer.prepared("cuda thresholds", lambda: _thresholds(layer))
        scaled = layer.scale_filter is not None
        if prologue is None:
            return pack(launcher, x, thresholds, magnitudes=scaled), x
        return norm_pack(launcher, x, _norm(prologue, x), thresholds, magnitudes=scaled, keep=keep)

    def signs(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        x, prologue = self._tensor(x, fused)
        inside = channels_last(_typed(x), layer.geometry.kind)
        with _readable_errors():
            packed = self._signs(layer, inside, prologue, keep=False)[0]
        planes = from_words(packed.words, inside.shape[-1]).unbind(-2)
        signs = [restore_layout(plane, layer.geometry.kind, x) for plane in planes]
        return torch.stack(signs) if len(signs) > 1 else signs[0]

    def normalize(self, x: Tensor, prologue: Prologue) -> Tensor:
        if x.dim() not in (3, 4):
            return super().normalize(x, prologue)
        kind = "conv2d" if x.dim() == 4 else "conv1d"
        inside = channels_last(_typed(x), kind)
        with _readable_errors():
            return restore_layout(
                normalize(self.launcher(x.device), inside, _norm(prologue, inside)), kind, x
            )

    def blend(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        return torch.lerp(new, old, betas.to(new.dtype).reshape(-1, *[1] * (new.dim() - 1)))

    def binary_attention(
        self, q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
    ) -> Tensor:
        # The reference's formula: on tensor cores torch's fused attention over scaled signs is hard to beat.
        return super().binary_attention(q, k, v, score_scale.to(q.dtype), scale)

    def kernel(self, geometry: LayerGeometry, planes: int = 1) -> str:
        launcher = self.launcher(torch.device("cuda"))
        shape = _shape(geometry)
        # For an output of medium size; the tile may differ for others.
        size = ConvSize(shape.words, shape.kernel, shape.stride, 16, 32, 32, shape.out_channels, planes)
        tile = tile_for(launcher, size)
        if tile is None:
            return "CUDA cores: 64 pixels x 64 filters per block"
        emulated = "" if launcher.capability // 10 in (8, 9) else " (emulated by this GPU)"
        return f"binary tensor cores{emulated}: 128 pixels x {tile.filters} filters per block"


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn errors that a user can fix into a BidmError."""
    try:
        yield
    except CompileError as error:
        reason = first_line(error)
        raise BidmError(f"the CUDA kernels cannot be compiled: {reason}; use `backend` torch") from error


def _shape(geometry: LayerGeometry) -> ConvShape:
    g = geometry
    return ConvShape(g.in_channels, g.out_channels, g.kernel, g.stride, g.padding)


def _weights(layer: LayerTensors) -> ConvWeights:
    shape, words = _shape(layer.geometry), weight_words(layer.weight_bits, layer.geometry).contiguous()
    floats = _as(layer.scale_filter), _as(layer.weight_scale), _as(layer.bias)
    # Read back from the device at the layer's first run, as |s|.
    plane_scales = () if layer.plane_scale is None else tuple(layer.plane_scale.tolist())
    return ConvWeights(shape, words, *floats, plane_scales)


def _thresholds(layer: LayerTensors) -> Tensor | None:
    """tau, and delta of further planes below it [planes, C]."""
    if layer.plane_offset is None:
        return _as(layer.threshold)
    offsets, first = layer.plane_offset, layer.threshold
    return torch.cat([torch.zeros_like(offsets[:1]) if first is None else first[None], offsets])


def _shortcut(layer: LayerTensors, x: Tensor | None) -> tuple[Tensor | None, float]:
    """P(I) of I [N, H, W, C] but for the number of channels, which the kernel adapts; and |s|."""
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
    norm = prologue.norm
    assert isinstance(norm, nn.GroupNorm)
    affine = _as(norm.weight), _as(norm.bias)
    film = _as(prologue.scale, x.dtype), _as(prologue.shift, x.dtype)
    return Norm(norm.num_groups, norm.eps, *affine, *film, prologue.silu)


def _typed(x: Tensor) -> Tensor:
    return x if x.dtype in ACTIVATIONS else x.float()


def _as(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()
