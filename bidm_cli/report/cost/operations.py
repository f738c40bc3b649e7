"""Cost of one binary layer: bit operations, float operations by item, and bytes as stored.

The rule for float operations: one for every add, multiply, compare or fused multiply-add that an
implementation performs on an element. A mean over n values is n operations (n - 1 adds and one multiply);
taking an absolute value, reading an index and repeating a value are free.
"""

from __future__ import annotations

import math

from bidm_cli.binary.layer_parts import part_shapes
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.recipe.spec import BinarySpec

ITEMS: dict[str, str] = {
    "threshold": "compare of I with -tau: 1 an input element",
    "input_scale": "A, the mean of |I| over channels: 1 an input element",
    "scale_map": "K = A * k: kh kw an output pixel",
    "output_scale": "D K alpha + bias: 1 an output element for each of K and alpha (the bias is fused)",
    "shortcut": "+ |s| P(I): 1 an output element",
    "shortcut_pool": "average of stride cells: sh sw a pooled element",
    "shortcut_tile": "average of channels where C > O: C an output pixel",
    "shortcut_conv": "float 1x1 shortcut convolution: C O an output pixel",
    "additions": "1-bit weights with float activations: 1 a tap, as in the float layer",
    "scores": "binary attention scores, D A_q A_k: 1 a score, and signs and means of q and k: 2 an element",
    "connections": "(1 - beta) h + beta h_prev: 2 an element of each connected block's output",
}
"""Items of the float-operation count of a binary network and the rule of each."""


def bit_operations(geometry: LayerGeometry, spec: BinarySpec, out_elements: int) -> int:
    """BOPs: binary multiply-accumulates, 64 of which count as one operation (Bi-Real Net, sec. 4)."""
    return geometry.fan_in * out_elements if spec.activations == "binary" else 0


def float_operations(
    geometry: LayerGeometry, spec: BinarySpec, in_elements: int, out_elements: int, has_bias: bool
) -> dict[str, int]:
    """Float operations of one layer by item of :data:`ITEMS`, for numbers of input and output elements."""
    pixels = out_elements // geometry.out_channels
    items: dict[str, int] = {}
    binary = spec.activations == "binary"
    mapped = binary and spec.activation_scale != "none"
    if binary:
        items["threshold"] = in_elements
    else:
        items["additions"] = geometry.fan_in * out_elements
    if mapped:
        items["input_scale"] = in_elements
        items["scale_map"] = geometry.taps * pixels
    factors = int(mapped) + int(spec.weight_scale != "none")
    items["output_scale"] = out_elements * (factors or int(has_bias))
    if spec.shortcut != "none":
        items |= _shortcut_operations(geometry, spec, out_elements)
    return {name: count for name, count in items.items() if count}


def _shortcut_operations(geometry: LayerGeometry, spec: BinarySpec, out_elements: int) -> dict[str, int]:
    c, o = geometry.in_channels, geometry.out_channels
    pixels = out_elements // o
    cell = geometry.stride[0] * geometry.stride[1]
    items = {"shortcut": out_elements, "shortcut_pool": c * pixels * cell if cell > 1 else 0}
    if spec.shortcut == "conv" and c != o:
        items["shortcut_conv"] = c * o * pixels
    elif c > o:
        items["shortcut_tile"] = c * pixels
    return items


def stored_bytes(geometry: LayerGeometry, spec: BinarySpec, has_bias: bool, float_bytes: int) -> int:
    """Bytes of a packed layer: filters of bits padded to a byte, everything else ``float_bytes`` a number."""
    sizes = {name: math.prod(shape) for name, shape in part_shapes(geometry, spec, has_bias).items()}
    return sizes.pop("weight_bits") + sum(sizes.values()) * float_bytes
