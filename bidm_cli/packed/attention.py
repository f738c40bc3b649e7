"""The attention products of a packed network, run by a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.networks.layers import AttentionProduct
from bidm_cli.packed.select import backend_for


class PackedAttention(AttentionProduct):
    """softmax(q k^T scale) v in floats; takes the place of :class:`AttentionProduct`.

    Attributes:
        backend: as in :class:`bidm_cli.packed.layers.PackedLayer`.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return backend_for(self.backend, q.device.type).attention(q, k, v, scale)


class PackedBinaryAttention(PackedAttention):
    """Attention with binary scores (:mod:`bidm_cli.binary.attention`).

    Attributes:
        score_scale: gamma [heads], float32 copy of the stored values.
    """

    score_scale: Tensor

    def __init__(self, heads: int, backend: str = "auto") -> None:
        super().__init__(backend)
        self.register_buffer("score_scale", torch.zeros(heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        backend = backend_for(self.backend, q.device.type)
        return backend.binary_attention(q, k, v, self.score_scale, scale)

    def extra_repr(self) -> str:
        return f"{len(self.score_scale)} heads, binary scores"
