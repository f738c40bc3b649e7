"""The numba backend: packed layers on the CPU, in integers, by the kernels of :mod:`bidm_cli.packed.cpu`.

Activations are float32 with the channels last: convolutions return channels_last tensors, and convert others
first, so that a network stays in that layout once it is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bidm_cli.binary import functional
from bidm_cli.networks.fusion import NOTHING, Features, Fused, Prologue
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.lucidrains_unet import RMSNorm
from bidm_cli.packed.backends.layout import channels_last, restore_layout
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.cpu.codegen.isa import Tile, instruction_set, tiles_for
from bidm_cli.packed.cpu.ops import winograd
from bidm_cli.packed.cpu.ops.attention import attention, binary_attention
from bidm_cli.packed.cpu.ops.autotune import tuned_tile
from bidm_cli.packed.cpu.ops.blend import blend
from bidm_cli.packed.cpu.ops.conv import ConvPlan
from bidm_cli.packed.cpu.ops.norm import NormPlan, PixelNorm, norm_plan, normalize
from bidm_cli.packed.cpu.ops.warm_up import prepare
from bidm_cli.packed.cpu.ops.weights import CpuWeights
from bidm_cli.packed.cpu.runtime.sequence import LaunchQueue
from bidm_cli.packed.cpu.runtime.workspaces import Workspaces
from bidm_cli.packed.tensors import LayerTensors
from bidm_cli.packed.uses import Products, Use


class NumbaBackend(TorchBackend):
    """See :class:`bidm_cli.packed.backend.Backend`.

    Attributes:
        tile: the form of the inner loop, for every layer; None to choose by shape and timing.
    """

    name, channels_last, reads_virtual = "numba", True, True

    def __init__(self, tile: Tile | None = None) -> None:
        self.tile = tile

    def fuses(self, prologue: Prologue | None) -> bool:
        return prologue is None or isinstance(prologue.norm, (nn.GroupNorm, RMSNorm))

    def run(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        kind, (prologue, upsample, offset, residual) = layer.geometry.kind, fused
        if layer.spec.activations == "float" or (kind == "linear" and prologue is not None):
            return super().run(layer, x, fused)
        inside = _inside(x, kind)
        plan = self._plan(layer, inside, upsample)
        if upsample > 1 and layer.shortcut_scale is not None and not plan.reads_input:
            return self.run(layer, self._input(x, fused), Fused(None, 1, offset, residual))
        out = torch.empty(inside[0].shape[0], *plan.out_size, layer.geometry.out_channels)
        offset = None if offset is None else offset.contiguous()
        residual = None if residual is None else channels_last(residual.float(), kind)
        with LaunchQueue() as queue:
            values = _pack(plan, inside, prologue)
            if values and not plan.reads_input:
                queue.flush()
                values = (_shortcut(layer, plan, values[0]),)
            plan.convolve(out, values, offset, residual)
        return restore_layout(out, kind, x)

    def signs(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        inside, kind = _inside(x, layer.geometry.kind), layer.geometry.kind
        plan = self._plan(layer, inside, fused.upsample)
        _pack(plan, inside, fused.prologue)
        planes = [restore_layout(plane, kind, x) for plane in plan.signs()]
        return torch.stack(planes) if len(planes) > 1 else planes[0]

    def normalize(self, x: Tensor, prologue: Prologue) -> Tensor:
        if x.dim() not in (3, 4):
            return super().normalize(x, prologue)
        kind = "conv2d" if x.dim() == 4 else "conv1d"
        inside = channels_last(x.float(), kind)
        return restore_layout(normalize(inside, _norm((inside,), prologue), prologue.silu), kind, x)

    def convolves(self, conv: nn.Conv2d) -> bool:
        return winograd.takes(conv) or _is_pointwise(conv)

    def convolve(self, conv: nn.Conv2d, x: Tensor, fused: Fused = NOTHING) -> Tensor:
        if fused.offset is not None:
            return super().convolve(conv, x, fused)
        if _is_pointwise(conv):
            return self._pointwise(conv, self._input(x, fused), fused.residual)
        images, _, height, width = x.shape
        if images * height * width * fused.upsample**2 < winograd.FEWEST_PIXELS:
            return super().convolve(conv, x, fused)
        inside, residual = channels_last(x.float(), "conv2d"), fused.residual
        if fused.prologue is not None:
            inside = normalize(inside, _norm((inside,), fused.prologue), fused.prologue.silu)
        if residual is not None:
            residual = channels_last(residual.float(), "conv2d")
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        out = winograd.winograd(inside, weight, conv.bias, fused.upsample, residual)
        return restore_layout(out, "conv2d", x)

    def _pointwise(self, conv: nn.Conv2d, x: Tensor, residual: Tensor | None) -> Tensor:
        """A 1x1 convolution as a matrix product, straight into the result's memory."""
        inside, weight = channels_last(x.float(), "conv2d"), conv.weight.flatten(1).T
        out = torch.empty(*inside.shape[:3], conv.out_channels)
        rows, into = inside.flatten(0, 2), out.flatten(0, 2)
        if conv.bias is None:
            torch.mm(rows, weight, out=into)
        else:
            torch.addmm(conv.bias, rows, weight, out=into)
        if residual is not None:
            out += channels_last(residual.float(), "conv2d")
        return restore_layout(out, "conv2d", x)

    def blend(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        return blend(new, old, betas)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, products: Products = "float32"
    ) -> Tensor:
        return attention(q, k, v, scale, products)

    def binary_attention(
        self, q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
    ) -> Tensor:
        return binary_attention(q, k, v, score_scale, scale)

    def warm_up(
        self, uses: Iterable[Use] | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Compile kernels now, or find them in the cache; see :func:`prepare`."""
        prepare(uses, say)

    def kernel(self, geometry: LayerGeometry) -> str:
        return f"{instruction_set()}: {self.tile or tiles_for(geometry)[0]}"

    def _plan(self, layer: LayerTensors, inside: tuple[Tensor, ...], repeat: int) -> ConvPlan:
        n, height, width, split = inside[0].shape

        def make() -> ConvPlan:
            size = (n, repeat * height, repeat * width)
            tile = self.tile or tuned_tile(layer.geometry, size, layer.spec.planes)
            weights = layer.prepared(("cpu weights", tile), lambda: CpuWeights.of(layer, tile))
            return ConvPlan(weights, (n, height, width), split, repeat)

        return layer.prepared("plans", Workspaces).get((n, height, width, split, repeat), make)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return shape == ((1, 1), (1, 1), (0, 0), 1)


def _shortcut(layer: LayerTensors, plan: ConvPlan, x: Tensor) -> Tensor:
    """P(I) of I [N, H, W, C], where the kernel cannot compute it itself."""
    geometry = layer.geometry
    if geometry.kind == "linear":
        return functional.shortcut(x, geometry, plan.out_size, layer.shortcut_weight).contiguous()
    x = functional.shortcut(x.permute(0, 3, 1, 2), geometry, plan.out_size, layer.shortcut_weight)
    return x.permute(0, 2, 3, 1).contiguous()


def _inside(x: Features, kind: str) -> tuple[Tensor, ...]:
    """An input's tensors with the channels last, float32."""
    return tuple(channels_last(part.float(), kind) for part in ((x,) if isinstance(x, Tensor) else x))


def _pack(plan: ConvPlan, inside: tuple[Tensor, ...], prologue: Prologue | None) -> tuple[Tensor, ...]:
    norm = None if prologue is None else _norm(inside, prologue)
    return plan.pack(inside, norm, prologue is not None and prologue.silu)


def _norm(inside: tuple[Tensor, ...], prologue: Prologue) -> NormPlan | PixelNorm:
    if isinstance(prologue.norm, RMSNorm):
        factors = prologue.norm.g.flatten() * prologue.norm.scale
        return PixelNorm.make(len(inside[0]), factors, prologue.scale, prologue.shift)
    assert isinstance(prologue.norm, nn.GroupNorm)
    second = inside[1] if len(inside) == 2 else None
    plan = norm_plan(inside[0], prologue.norm.num_groups, second)
    plan.run(inside[0], prologue.norm, prologue.scale, prologue.shift, second)
    return plan
