"""Cost of one binary layer: bit operations, float operations by item, and bytes as stored.

Float operations: one per add, multiply, compare or fused multiply-add on an element (n for a mean over n
values); absolute values, reading an index and repeating a value are free.
"""

from __future__ import annotations

import math

from bidm_cli.binary.layer_parts import part_shapes
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.recipe.spec import BinarySpec

ITEMS: dict[str, str] = {
    "binary (BOPs / 64)": "binary multiply-accumulates, 64 to one operation",
    "float layers": "multiply-accumulates of the layers that stay float",
    "attention products": "what is float of softmax(q k) v; only in the figures with attention",
    "threshold": "compare of I with -tau: 1 per input element and activation plane",
    "planes": "D1 + g D2: 1 fused multiply-add per output element for each further activation plane",
    "input_scale": "A, the mean of |I| over channels: 1 per input element",
    "scale_map": "K = A * k: kh kw per output pixel",
    "output_scale": "D K alpha + bias: 1 per output element for each of K and alpha (the bias is fused)",
    "shortcut": "+ |s| P(I): 1 per output element",
    "shortcut_pool": "average of stride cells: sh sw per pooled element",
    "shortcut_tile": "average of channels where C > O: C per output pixel",
    "shortcut_conv": "float 1x1 shortcut convolution: C O per output pixel",
    "additions": "1-bit weights with float activations: 1 per tap, as in the float layer",
    "scores": "binary attention scores D A_q A_k: 1 per score, and signs and means of q and k: 2 per element",
    "connections": "(1 - beta) h + beta h_prev: 2 per element of each connected block's output",
}
"""Items of a binary network's operation count and the rule of each."""


def bit_operations(geometry: LayerGeometry, spec: BinarySpec, out_elements: int) -> int:
    """BOPs: binary multiply-accumulates, 64 of which count as one operation (Bi-Real Net, sec. 4)."""
    return spec.planes * geometry.fan_in * out_elements if spec.activations == "binary" else 0


def float_operations(
    geometry: LayerGeometry, spec: BinarySpec, in_elements: int, out_elements: int, has_bias: bool
) -> dict[str, int]:
    """Float operations of one layer by item of :data:`ITEMS`, for numbers of input and output elements."""
    c, o, pixels = geometry.in_channels, geometry.out_channels, out_elements // geometry.out_channels
    binary, cell = spec.activations == "binary", geometry.stride[0] * geometry.stride[1]
    mapped, short = binary and spec.activation_scale != "none", spec.shortcut != "none"
    widened = spec.shortcut == "conv" and c != o
    factors = int(mapped) + int(spec.weight_scale != "none")
    items = {
        "threshold": spec.planes * in_elements if binary else 0,
        "planes": (spec.planes - 1) * out_elements,
        "additions": 0 if binary else geometry.fan_in * out_elements,
        "input_scale": in_elements if mapped else 0,
        "scale_map": geometry.taps * pixels if mapped else 0,
        "output_scale": out_elements * (factors or int(has_bias)),
        "shortcut": out_elements if short else 0,
        "shortcut_pool": c * pixels * cell if short and cell > 1 else 0,
        "shortcut_conv": c * o * pixels if widened else 0,
        "shortcut_tile": c * pixels if short and c > o and not widened else 0,
    }
    return {name: count for name, count in items.items() if count}


def stored_bytes(geometry: LayerGeometry, spec: BinarySpec, has_bias: bool, float_bytes: int) -> int:
    """Bytes of a packed layer: filters of bits padded to a byte, everything else ``float_bytes`` a number."""
    sizes = {name: math.prod(shape) for name, shape in part_shapes(geometry, spec, has_bias).items()}
    return sizes.pop("weight_bits") + sum(sizes.values()) * float_bytes
