"""The building blocks of the OpenAI U-Net (Dhariwal and Nichol 2021, arXiv 2105.05233) under their own names.

improved-diffusion, guided-diffusion and latent diffusion share them. Original zero initialisations are left
out: weights come from a checkpoint.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.layers import AttentionProduct, with_role
from bidm_cli.networks.spatial_transformer import SpatialTransformer


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm as this family has it: 32 groups, eps 1e-5."""
    return nn.GroupNorm(32, channels, eps=1e-5)


class Downsample(nn.Module):
    """Halve H and W: 3x3 stride-2 conv padded by 1 on all sides, or a 2x2 average without weights."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.op: nn.Module = nn.AvgPool2d(2)
        if with_conv:
            self.op = with_role(nn.Conv2d(channels, channels, 3, stride=2, padding=1), "resample")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then a 3x3 conv unless ``with_conv`` is false."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv: nn.Module | None = None
        if with_conv:
            self.conv = with_role(nn.Conv2d(channels, channels, 3, padding=1), "resample")

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """Two 3x3 convs with the time embedding in between, and a shortcut: [N, C, H, W] -> [N, O, H', W'].

    Args:
        embedding: width of the time embedding.
        film: the embedding scales and shifts the second norm's result (scale first) instead of being added.
        resample: "up" or "down" changes H and W by 2 inside the block, before the first conv.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        *,
        film: bool = False,
        resample: Literal["up", "down"] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.film, self.resample = film, resample
        self.in_layers = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            with_role(nn.Conv2d(channels, out_channels, 3, padding=1), "conv"),
        )
        projection = nn.Linear(embedding, 2 * out_channels if film else out_channels)
        self.emb_layers = nn.Sequential(nn.SiLU(), with_role(projection, "time_projection"))
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            with_role(nn.Conv2d(out_channels, out_channels, 3, padding=1), "conv"),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            self.skip_connection = with_role(nn.Conv2d(channels, out_channels, 1), "skip")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = self._resampled(h), self._resampled(x)
        h = self.in_layers[2](h)

        projected = self.emb_layers(embedding)[:, :, None, None]
        if self.film:
            scale, shift = projected.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + projected)
        for layer in self.out_layers[1:]:
            h = layer(h)
        return self.skip_connection(x) + h

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual: [N, C, H, W] -> [N, C, H, W].

    Args:
        new_order: rows of ``qkv`` are all queries, all keys, all values; otherwise (the older codes) they
            are the query, key and value of the first head, then of the second, ...
    """

    def __init__(self, channels: int, heads: int, new_order: bool = False) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"attention over {channels} channels cannot have {heads} heads")
        self.heads, self.new_order = heads, new_order
        self.norm = group_norm(channels)
        self.qkv = with_role(nn.Conv1d(channels, 3 * channels, 1), "attention_qkv")
        self.product = AttentionProduct()
        self.proj_out = with_role(nn.Conv1d(channels, channels, 1), "attention_out")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.attend(self.qkv(self.norm(x).flatten(2)))).reshape(x.shape)

    def attend(self, qkv: Tensor) -> Tensor:
        """The attention between the two projections, [N, 3C, L] -> [N, C, L]."""
        # Contiguous [N, L, 3C]: torch's fused attention wants the head width innermost.
        qkv = qkv.transpose(1, 2).contiguous()
        if self.new_order:
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        else:
            q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).unbind(3)
        attended = self.product(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attended.transpose(2, 3).flatten(1, 2)


class Stage(nn.Sequential):
    """Layers in a row; each gets what it takes of time embedding and context."""

    def forward(  # type: ignore[override]
        self, x: Tensor, embedding: Tensor, context: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x
