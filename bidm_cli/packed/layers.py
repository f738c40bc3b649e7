"""Packed layers: nn.Modules that hold bits and call a backend.

layer = packed_layer(record, backend="auto")
layer.load_state_dict(tensors)                  # names as in the packed file
y = layer(x)                                    # float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.backend import Prologue
from bidm_cli.packed.format.layer_table import LayerRecord, tensor_shapes
from bidm_cli.packed.lazy import Lazy
from bidm_cli.packed.select import backend_for
from bidm_cli.recipe.spec import BinarySpec

Made = TypeVar("Made")


class PackedLayer(nn.Module):
    """What the three packed layers share.

    Attributes:
        geometry, spec, role: as in the layer table.
        backend: "auto" or a backend's name; the backend itself is picked for the device of each input.
        weight_bits: uint8 [O, ceil(C kh kw / 8)], see :mod:`bidm_cli.packed.format.bits`.
        weight_scale, bias [O], threshold [C], scale_filter [kh, kw], shortcut_scale [],
        shortcut_weight [O, C, 1, 1]: float32 copies of the stored values, or None.
    """

    weight_bits: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None
    scale_filter: Tensor | None
    shortcut_scale: Tensor | None
    shortcut_weight: Tensor | None

    PARTS = ("weight_scale", "bias", "threshold", "scale_filter", "shortcut_scale", "shortcut_weight")

    def __init__(self, record: LayerRecord, backend: str = "auto") -> None:
        super().__init__()
        if record.geometry is None or record.spec is None:
            raise ValueError(f"{record.name} is a float layer")
        self.geometry: LayerGeometry = record.geometry
        self.spec: BinarySpec = record.spec
        self.role, self.backend = record.role, backend
        self._prepared: dict[str, Any] = {}
        shapes = tensor_shapes(record)
        self.register_buffer("weight_bits", torch.zeros(shapes["weight_bits"], dtype=torch.uint8))
        for part in self.PARTS:
            self.register_buffer(part, torch.zeros(shapes[part]) if part in shapes else None)

    def forward(
        self,
        x: Tensor | Lazy,
        prologue: Prologue | None = None,
        offset: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`bidm_cli.packed.backend.Backend.run`; x is only lazy where the backend reads that."""
        backend = backend_for(self.backend, x.device.type)
        return backend.run(self, x, prologue, offset, residual)  # type: ignore[arg-type]

    def prepared(self, key: str, make: Callable[[], Made]) -> Made:
        """What a backend derives from the layer's tensors, made once and dropped when they change."""
        if key not in self._prepared:
            self._prepared[key] = make()
        return self._prepared[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        self._prepared.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies start unprepared: what backends prepare may hold addresses of this layer's tensors."""
        return {**self.__dict__, "_prepared": {}}

    def extra_repr(self) -> str:
        return f"{self.geometry.in_channels}, {self.geometry.out_channels}, {self.spec}"


class PackedConv2d(PackedLayer):
    """1-bit 2-d convolution, [N, C, H, W] -> [N, O, H', W']."""


class PackedConv1d(PackedLayer):
    """1-bit 1-d convolution, [N, C, L] -> [N, O, L']."""


class PackedLinear(PackedLayer):
    """1-bit linear layer, [..., C] -> [..., O]."""


def packed_layer(record: LayerRecord, backend: str = "auto") -> PackedLayer:
    """The empty packed layer of a record of the layer table."""
    kinds = {"conv2d": PackedConv2d, "conv1d": PackedConv1d, "linear": PackedLinear}
    if record.geometry is None:
        raise ValueError(f"{record.name} is a float layer")
    return kinds[record.geometry.kind](record, backend)
