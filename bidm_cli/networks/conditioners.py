"""Conditioners: labels to a context, segmentation maps to conditioning channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """Labels [N] to one context token each, [N, 1, D] (CompVis ``ClassEmbedder``)."""

    def __init__(self, n_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)[:, None]


class SpatialRescaler(nn.Module):
    """Segmentation maps, one-hot [N, C, H, W], made smaller and mapped to few channels (CompVis).

    Args:
        n_stages: how often the map is scaled by ``multiplier`` with ``method`` of torch's interpolate.
        out_channels: of the 1x1 convolution after it; None for none.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.channel_mapper: nn.Module = nn.Identity()
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            maps = F.interpolate(maps, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(maps)
