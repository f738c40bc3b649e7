"""What turns a label into the context that a network attends to."""

from __future__ import annotations

from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """Labels [N] to one context token each, [N, 1, D] (CompVis ``ClassEmbedder``)."""

    def __init__(self, n_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)[:, None]
