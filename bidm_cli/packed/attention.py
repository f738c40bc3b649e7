"""The attention product of a packed network, run by a backend."""

from __future__ import annotations

from torch import Tensor

from bidm_cli.networks.layers import AttentionProduct
from bidm_cli.packed.select import backend_for


class PackedAttention(AttentionProduct):
    """softmax(q k^T scale) v in floats; takes the place of :class:`AttentionProduct`.

    Attributes:
        backend: as in :class:`bidm_cli.packed.modules.PackedLayer`.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return backend_for(self.backend, q.device.type).attention(q, k, v, scale)
