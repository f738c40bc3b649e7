"""Range of a pixel model's values where it is not [-1, 1], in the place of a first stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MARGIN = 1e-6


class ValueRange(nn.Module):
    """Map between images in [-1, 1] and the values that a network was trained on; no weights.

    Args:
        kind: "unit", images in [0, 1]; "logit", their logits, as ermongroup/ddim's ``logit_transform``
            (datasets/__init__.py).
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in ("unit", "logit"):
            raise ValueError(f"no range of values {kind!r}")
        self.kind = kind

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] to the network's values."""
        unit = (images + 1) / 2
        if self.kind == "unit":
            return unit
        inner = _MARGIN + (1 - 2 * _MARGIN) * unit
        return torch.log(inner) - torch.log1p(-inner)

    def decode(self, values: Tensor) -> Tensor:
        """The network's values [N, C, H, W] to images in [-1, 1]."""
        return 2 * (values if self.kind == "unit" else values.sigmoid()) - 1
