"""Record of one packed layer, as backends read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.recipe.spec import BinarySpec

Made = TypeVar("Made")


@dataclass(eq=False)
class LayerTensors:
    """Tensors of a packed layer (:data:`bidm_cli.binary.layer_parts.LAYER_PARTS`), and what backends derive.

    A layer whose tensors change, move or are copied makes a new record.

    Attributes:
        weight_bits: uint8 [O, ceil(C kh kw / 8)], see :mod:`bidm_cli.packed.format.bits`.
        weight_scale, bias [O], threshold [C], plane_offset [planes - 1, C], plane_scale [planes - 1],
        scale_filter [kh, kw], shortcut_scale [], shortcut_weight [O, C, 1, 1]: float32 copies of the stored
        values, or None.
    """

    geometry: LayerGeometry
    spec: BinarySpec
    weight_bits: Tensor
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | None = None
    plane_offset: Tensor | None = None
    plane_scale: Tensor | None = None
    scale_filter: Tensor | None = None
    shortcut_scale: Tensor | None = None
    shortcut_weight: Tensor | None = None
    _prepared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def prepared(self, key: Any, make: Callable[[], Made]) -> Made:
        """The value that a backend derives from the tensors, made at first use."""
        if key not in self._prepared:
            self._prepared[key] = make()
        return self._prepared[key]

    def epilogue(self) -> dict[str, Any]:
        """Tensors of the epilogue, or None, as :func:`bidm_cli.binary.functional.forward` takes them."""
        names = ("scale_filter", "weight_scale", "bias", "shortcut_scale", "shortcut_weight")
        return {name: getattr(self, name) for name in names}
