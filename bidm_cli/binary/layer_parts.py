"""Tensors of a binary layer: the one table that training, the file format, cost and kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.recipe.spec import BinarySpec

Shape = Callable[[LayerGeometry, BinarySpec], tuple[int, ...]]


class LayerPart(NamedTuple):
    """One tensor of a binary layer.

    Attributes:
        name: last part of its name in a packed file, and the layer's attribute.
        present: True by geometry, spec and the layer's having a bias.
        dtype: in a packed network; the file may hold floats in half precision.
    """

    name: str
    shape: Shape
    present: Callable[[LayerGeometry, BinarySpec, bool], bool]
    dtype: torch.dtype = torch.float32


def _if_binary_activations(option: str) -> Callable[[LayerGeometry, BinarySpec, bool], bool]:
    return lambda g, spec, bias: spec.activations == "binary" and getattr(spec, option) != "none"


def _widens(geometry: LayerGeometry, spec: BinarySpec, bias: bool) -> bool:
    return spec.shortcut == "conv" and geometry.in_channels != geometry.out_channels


def _rows_of_bits(geometry: LayerGeometry, spec: BinarySpec) -> tuple[int, ...]:
    return (geometry.out_channels, -(-geometry.fan_in // 8))


def _several_planes(geometry: LayerGeometry, spec: BinarySpec, bias: bool) -> bool:
    return spec.planes > 1


LAYER_PARTS = (
    LayerPart("weight_bits", _rows_of_bits, lambda *_: True, torch.uint8),
    LayerPart("weight_scale", lambda g, s: (g.out_channels,), lambda g, s, bias: s.weight_scale != "none"),
    LayerPart("bias", lambda g, s: (g.out_channels,), lambda g, s, bias: bias),
    LayerPart("threshold", lambda g, s: (g.in_channels,), _if_binary_activations("threshold")),
    LayerPart("plane_offset", lambda g, s: (s.planes - 1, g.in_channels), _several_planes),
    LayerPart("plane_scale", lambda g, s: (s.planes - 1,), _several_planes),
    LayerPart("scale_filter", lambda g, s: g.kernel, _if_binary_activations("activation_scale")),
    LayerPart("shortcut_scale", lambda g, s: (), lambda g, s, bias: s.shortcut != "none"),
    LayerPart("shortcut_weight", lambda g, s: (g.out_channels, g.in_channels, 1, 1), _widens),
)
"""Every tensor that a binary layer can have, in the order of a packed layer's state dict."""


def part_shapes(geometry: LayerGeometry, spec: BinarySpec, bias: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a binary layer has, by name."""
    parts = [part for part in LAYER_PARTS if part.present(geometry, spec, bias)]
    return {part.name: part.shape(geometry, spec) for part in parts}
