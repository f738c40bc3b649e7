"""Packed layers: nn.Modules that hold bits and run on a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.binary.connections import CrossTimestepConnections
from bidm_cli.binary.layer_parts import LAYER_PARTS
from bidm_cli.networks.fusion import NOTHING, Features, Fused, Prologue
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import AttentionProduct, SkipJoin, role_of, with_role
from bidm_cli.networks.lucidrains_unet import RMSNorm
from bidm_cli.packed.backend import Backend
from bidm_cli.packed.format.layer_table import LayerRecord, tensor_shapes
from bidm_cli.packed.tensors import LayerTensors
from bidm_cli.packed.uses import Products, Use
from bidm_cli.recipe.spec import BinarySpec


class RunsOnBackend:
    """Mixin of modules that run on a backend; a packed model binds all of them to one."""

    backend: Backend

    def bind(self, backend: Backend) -> None:
        """Run on ``backend`` from now on."""
        self.backend = backend

    def uses(self) -> tuple[Use, ...]:
        """Uses of the backend whose kernels this module needs."""
        return ()

    def fuses(self, prologue: Prologue | None) -> bool:
        """True if the module takes this prologue (:mod:`bidm_cli.networks.fusion`)."""
        return self.backend.fuses(prologue)

    @property
    def reads_virtual(self) -> bool:
        """True if the module reads concatenations and upsampled pixels in place."""
        return self.backend.reads_virtual


class PackedLayer(RunsOnBackend, nn.Module):
    """1-bit convolution or linear layer of a record of the layer table, empty and not yet bound to a backend.

    x [N, C, H, W], [N, C, L] or [..., C] -> [N, O, H', W'], [N, O, L'] or [..., O], by the geometry's kind.

    Attributes:
        geometry, spec, role: as in the layer table.
        weight_bits, weight_scale, ...: see :class:`bidm_cli.packed.tensors.LayerTensors`.
    """

    weight_bits: Tensor
    weight_scale: Tensor | None

    def __init__(self, record: LayerRecord) -> None:
        super().__init__()
        if record.geometry is None or record.spec is None:
            raise ValueError(f"{record.name} is a float layer")
        self.geometry: LayerGeometry = record.geometry
        self.spec: BinarySpec = record.spec
        self.role = record.role
        self._tensors: LayerTensors | None = None
        shapes = tensor_shapes(record)
        for part in LAYER_PARTS:
            empty = torch.zeros(shapes[part.name], dtype=part.dtype) if part.name in shapes else None
            self.register_buffer(part.name, empty)

    @property
    def tensors(self) -> LayerTensors:
        """Record of this layer for backends; another one once its tensors have changed."""
        if self._tensors is None:
            tensors = {part.name: getattr(self, part.name) for part in LAYER_PARTS}
            self._tensors = LayerTensors(self.geometry, self.spec, **tensors)
        return self._tensors

    def uses(self) -> tuple[Use, ...]:
        """A binary layer's kernel; layers with float activations run in torch."""
        return () if self.spec.activations == "float" else (Use("run", self.geometry, self.spec.planes),)

    def forward(self, x: Features, fused: Fused = NOTHING) -> Tensor:
        """See :meth:`bidm_cli.packed.backend.Backend.run`."""
        return self.backend.run(self.tensors, x, fused)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        self._tensors = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._tensors = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies start anew: what backends prepare may hold addresses of this layer's tensors."""
        return {**self.__dict__, "_tensors": None}

    def extra_repr(self) -> str:
        geometry = self.geometry
        return f"{geometry.kind}, {geometry.in_channels}, {geometry.out_channels}, {self.spec}"


class PackedAttention(RunsOnBackend, AttentionProduct):
    """softmax(q k^T scale) v in floats, in place of :class:`AttentionProduct`.

    Attributes:
        products: as :meth:`bidm_cli.packed.backend.Backend.attention` takes it.
    """

    products: Products = "float32"

    def uses(self) -> tuple[Use, ...]:
        return (Use("attention" if self.products == "float32" else "bfloat16 attention"),)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return self.backend.attention(q, k, v, scale, self.products)


class PackedBinaryAttention(PackedAttention):
    """Attention with binary scores (:mod:`bidm_cli.binary.attention`).

    Attributes:
        score_scale: gamma [heads], float32 copy of the stored values.
    """

    score_scale: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("score_scale", torch.zeros(heads))

    def uses(self) -> tuple[Use, ...]:
        return (Use("binary_attention"),)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return self.backend.binary_attention(q, k, v, self.score_scale, scale)

    def extra_repr(self) -> str:
        return f"{len(self.score_scale)} heads, binary scores"


class PackedFloatConv(RunsOnBackend, nn.Conv2d):
    """Float convolution of a first stage's decoder, by the backend where it has a kernel for its shape."""

    reads_virtual = False

    def uses(self) -> tuple[Use, ...]:
        return (Use("convolve"),) if self.backend.convolves(self) else ()

    def fuses(self, prologue: Prologue | None) -> bool:
        return self.backend.convolves(self) and self.backend.fuses(prologue)

    def forward(self, input: Tensor, fused: Fused = NOTHING) -> Tensor:
        """As :meth:`PackedLayer.forward`, on a tensor."""
        if self.backend.convolves(self):
            return self.backend.convolve(self, input, fused)
        return super().forward(input)


class PackedGroupNorm(RunsOnBackend, nn.GroupNorm):
    """Group norm, and the rest of a prologue if there is one, by the backend."""

    def uses(self) -> tuple[Use, ...]:
        return (Use("group norm"),)

    def forward(self, input: Tensor, prologue: Prologue | None = None) -> Tensor:
        return self.backend.normalize(input, prologue or Prologue(self))


class PackedRMSNorm(RunsOnBackend, RMSNorm):
    """lucidrains' RMS norm in torch; by the backend if a prologue comes with it."""

    def uses(self) -> tuple[Use, ...]:
        return (Use("RMS norm"),)

    def forward(self, x: Tensor, prologue: Prologue | None = None) -> Tensor:
        return super().forward(x) if prologue is None else self.backend.normalize(x, prologue)


class PackedJoin(RunsOnBackend, SkipJoin):
    """Skip concatenation, virtual on backends that read its tensors in place."""

    def forward(self, h: Tensor, skip: Tensor) -> Features:
        return (h, skip) if self.reads_virtual else super().forward(h, skip)


class PackedConnections(RunsOnBackend, CrossTimestepConnections):
    """Cross-timestep connections that blend by the backend."""

    def uses(self) -> tuple[Use, ...]:
        return (Use("blend"),)

    def interpolate(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        return self.backend.blend(new, old, betas)


def packed_module(module: nn.Module) -> nn.Module | None:
    """Packed counterpart of a module without bits, empty; None for one that stays."""
    if type(module) is nn.GroupNorm:
        return PackedGroupNorm(module.num_groups, module.num_channels, module.eps, module.affine)
    if type(module) is RMSNorm:
        return PackedRMSNorm(module.g.shape[1])
    return PackedJoin() if type(module) is SkipJoin else None


def packed_decoder_module(module: nn.Module) -> nn.Module | None:
    """:func:`packed_module`, and for float convolutions, in a decoder of images."""
    if type(module) is not nn.Conv2d:
        return packed_module(module)
    sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
    others = (module.dilation, module.groups, module.bias is not None, module.padding_mode)
    conv = PackedFloatConv(*sizes, *others)  # type: ignore[arg-type]
    return with_role(conv, role_of(module))
