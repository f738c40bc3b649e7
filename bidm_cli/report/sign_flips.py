"""Sign flips between two backends on a whole network.

Backends round floats differently, and where a rounded number crosses a threshold its sign flips: a whole step
in the next layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bidm_cli.packed.layers import PackedBinaryAttention, PackedLayer
from bidm_cli.packed.model import PackedModel
from bidm_cli.report.hooks import note_inputs


@dataclass
class SignFlips:
    """Signs that differ between two runs of the same network.

    Attributes:
        flipped, signs: totals over all binary layers, and queries and keys of binary attention.
        output_error: largest difference of the outputs, relative to the largest output.
        by_layer: (flipped, signs) per layer, in order of execution.
    """

    flipped: int = 0
    signs: int = 0
    output_error: float = 0.0
    by_layer: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Share of flipped signs."""
        return self.flipped / max(self.signs, 1)

    def to_json(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("flipped", "signs", "rate", "output_error")}


@torch.no_grad()
def count_sign_flips(
    a: PackedModel,
    b: PackedModel,
    x: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    y: Tensor | None = None,
) -> SignFlips:
    """Run both models on the same input and compare the bits that enter every binary layer.

    Both must be of the same file; x [N, C, H, W], t [N], context and y as for ``denoise``.
    """
    (bits_a, output_a), (bits_b, output_b) = (_bits_of(model, x, t, context, y) for model in (a, b))
    differ = {name: bits != bits_b[name].to(bits.device) for name, bits in bits_a.items()}
    by_layer = {name: (int(flips.sum()), flips.numel()) for name, flips in differ.items()}
    flipped, signs = (sum(layer[i] for layer in by_layer.values()) for i in (0, 1))
    difference = (output_a - output_b.to(output_a.device)).abs().max()
    error = float(difference / output_a.abs().max().clamp(min=1e-30))
    return SignFlips(flipped, signs, error, by_layer)


def _bits_of(
    model: PackedModel, x: Tensor, t: Tensor, context: Tensor | None, y: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    watched = {
        name: module
        for name, module in model.unet.named_modules()
        if isinstance(module, PackedBinaryAttention)
        or (isinstance(module, PackedLayer) and module.spec.activations == "binary")
    }
    return note_inputs(
        watched, lambda: model.denoise(x.to(model.device), t.to(model.device), context, y), _signs
    )


def _signs(module: PackedLayer | PackedBinaryAttention, inputs: tuple[Any, ...]) -> Tensor:
    if isinstance(module, PackedBinaryAttention):
        return torch.cat([(part >= 0).flatten() for part in inputs[:2]])
    return module.backend.signs(module.tensors, *inputs[:2])
