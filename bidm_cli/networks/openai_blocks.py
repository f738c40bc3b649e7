"""The building blocks of the OpenAI U-Net (Dhariwal and Nichol 2021, arXiv 2105.05233) under their own names.

improved-diffusion, guided-diffusion and latent diffusion share them. Original zero initialisations are left
out: weights come from a checkpoint.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from bidm_cli.networks.fusion import (
    Features,
    Prologue,
    fused_conv,
    fuses,
    joined,
    read_in_place,
    resampling_conv,
    shortcut,
)
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

    def forward(self, x: Features, embedding: Tensor) -> Tensor:
        norm1, _, conv1 = self.in_layers
        norm2, _, dropout, conv2 = self.out_layers
        projected = self.emb_layers(embedding)
        scale, shift = projected.chunk(2, dim=1) if self.film else (None, None)
        h, x, upsample = resampling_conv(
            conv1,
            read_in_place(conv1, x),
            Prologue(norm1, silu=True),
            self.resample,
            None if self.film else projected,
        )
        between = Prologue(norm2, True, scale, shift, dropout)
        return fused_conv(conv2, h, prologue=between, residual=shortcut(self.skip_connection, x, upsample))


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
        flat, norm = x.flatten(2), Prologue(self.norm)
        # Otherwise the norm takes the image as it is: channels-last, it would have to be copied.
        fused = fuses(self.qkv, norm)
        qkv = fused_conv(self.qkv, flat, prologue=norm) if fused else self.qkv(norm(x).flatten(2))
        attended = self.attend(qkv)
        return fused_conv(self.proj_out, attended, residual=flat).reshape(x.shape)

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
        self, x: Features, embedding: Tensor, context: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return joined(x)
