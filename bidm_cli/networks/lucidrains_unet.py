"""The U-Net of lucidrains/denoising-diffusion-pytorch from version 0.30 on, with the names of 2.x.

Weights of 1.8 and later load with ``load_state_dict(strict=True)``; those before need other names and, up to
1.7.1, the standardization of their weights (:mod:`bidm_cli.checkpoints.families.lucidrains.unet`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Features, Prologue, fused_conv, read_in_place, shortcut
from bidm_cli.networks.layers import (
    AttentionProduct,
    Block,
    DenoisingNetwork,
    LinearAttentionProduct,
    NetworkInputs,
    SkipJoin,
    conv3x3,
    embedding_layers,
    feature_points,
    with_role,
)
from bidm_cli.networks.unet_blocks import Upsample, skip_conv

NormKind = Literal["rms", "group"]
AttentionNorm = Literal["rms", "layer"]


class RMSNorm(nn.Module):
    """x / ||x||_2 * g * sqrt(C) over the channels of [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.scale


class SinusoidalTime(nn.Module):
    """[sin | cos] of t times theta^(-i / (dim/2 - 1)), [N] -> [N, dim]."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.count, self.theta = dim // 2, theta

    def forward(self, t: Tensor) -> Tensor:
        exponent = -math.log(self.theta) / max(self.count - 1, 1)
        frequencies = torch.exp(torch.arange(self.count, device=t.device) * exponent)
        angles = t.float()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ChannelNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * g over the channels of [N, C, H, W], up to version 1.6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.g


@dataclass(frozen=True)
class AttentionSize:
    """Size of a level's attentions: heads, their width, learned keys; and the norm's kind."""

    heads: int
    dim_head: int
    mem_kv: int
    norm: AttentionNorm

    def make_norm(self, channels: int) -> nn.Module:
        return RMSNorm(channels) if self.norm == "rms" else ChannelNorm(channels)


class ConvBlock(nn.Module):
    """Layers of a 3x3 conv, norm, FiLM, SiLU and dropout, which :class:`LucidrainsResnetBlock` runs."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: NormKind, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.proj = conv3x3(in_channels, out_channels, "conv")
        self.norm = RMSNorm(out_channels) if norm == "rms" else nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)

    def after(self, scale: Tensor | None = None, shift: Tensor | None = None) -> Prologue:
        """Everything after the conv, as the prologue of what comes next."""
        return Prologue(self.norm, True, scale, shift, self.dropout)


class LucidrainsResnetBlock(nn.Module):
    """Two :class:`ConvBlock`, the first modulated by the time embedding, with a residual."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        norm: NormKind,
        groups: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        projection = with_role(nn.Linear(embedding, 2 * out_channels), "time_projection")
        self.mlp = nn.Sequential(nn.SiLU(), projection)
        self.block1 = ConvBlock(in_channels, out_channels, norm, groups, dropout)
        self.block2 = ConvBlock(out_channels, out_channels, norm, groups, 0.0)
        self.res_conv = skip_conv(in_channels, out_channels)

    def forward(self, x: Features, embedding: Tensor) -> Tensor:
        x = read_in_place(self.block1.proj, x)
        scale, shift = self.mlp(embedding).chunk(2, dim=1)
        h = fused_conv(self.block1.proj, x)
        h = fused_conv(self.block2.proj, h, prologue=self.block1.after(scale, shift))
        return shortcut(self.res_conv, x, residual=self.block2.after()(h))


class _Attention(nn.Module):
    """Attention over the H*W positions and ``mem_kv`` learned ones, with a residual.

    The residual stands outside the original's module, where no feature could be taken after it.
    """

    memory_axis: int
    """Axis of the positions in one key or value, [heads, ., .]."""

    def __init__(self, channels: int, size: AttentionSize, product: nn.Module) -> None:
        super().__init__()
        self.heads, hidden = size.heads, size.heads * size.dim_head
        self.norm = size.make_norm(channels)
        shape = [2, size.heads, size.dim_head]
        shape.insert(self.memory_axis + 1, size.mem_kv)
        self.mem_kv = nn.Parameter(torch.randn(shape)) if size.mem_kv else None
        self.to_qkv = with_role(nn.Conv2d(channels, 3 * hidden, 1, bias=False), "attention_qkv")
        self.product = product
        self.to_out: nn.Module = with_role(nn.Conv2d(hidden, channels, 1), "attention_out")

    def projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values of normalised x, [N, 3, heads, dim_head, H*W]."""
        qkv = fused_conv(self.to_qkv, x, prologue=Prologue(self.norm))
        return qkv.flatten(2).unflatten(1, (3, self.heads, -1))

    def with_memory(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """Keys and values after the learned ones."""
        if self.mem_kv is None:
            return [k, v]
        both = zip(self.mem_kv, (k, v), strict=True)
        return [torch.cat([m.expand(len(k), *m.shape), part], dim=self.memory_axis + 1) for m, part in both]


class FullAttention(_Attention):
    """Softmax attention, with a residual."""

    memory_axis = 1

    def __init__(self, channels: int, size: AttentionSize) -> None:
        super().__init__(channels, size, AttentionProduct())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x).transpose(3, 4).contiguous().unbind(1)
        attended = self.product(q, *self.with_memory(k, v)).transpose(2, 3)
        return fused_conv(self.to_out, attended.reshape(len(x), -1, *x.shape[2:]), residual=x)


class LinearAttention(_Attention):
    """Attention without a product over pairs of positions (arXiv 1812.01243), with a residual.

    q is normalised by softmax over its channels, k over the positions, the learned ones included.

    Args:
        average: divide v by the number of positions, as versions up to 1.7.3 do.
    """

    memory_axis = 2

    def __init__(self, channels: int, size: AttentionSize, average: bool) -> None:
        super().__init__(channels, size, LinearAttentionProduct())
        self.scale, self.average = size.dim_head**-0.5, average
        self.to_out = nn.Sequential(self.to_out, size.make_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x).unbind(1)
        k, v = self.with_memory(k, v)
        q, k = q.softmax(dim=2) * self.scale, k.softmax(dim=3)
        if self.average:
            v = v / x[0, 0].numel()
        return x + self.to_out(self.product(q, k, v).reshape(len(x), -1, *x.shape[2:]))


def downsample(in_channels: int, out_channels: int, strided: bool) -> nn.Module:
    """Pixels to channels (c, row, column) at half the size, then a 1x1 conv; or a 4x4 conv of stride 2."""
    if strided:
        return with_role(nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), "resample")
    conv = with_role(nn.Conv2d(4 * in_channels, out_channels, 1), "resample")
    return nn.Sequential(nn.PixelUnshuffle(2), conv)


class LucidrainsUNet(DenoisingNetwork):
    """The whole network; one entry of ``dim_mults`` per level, finest first.

    Args:
        dim: base width; the levels' widths are ``dim * dim_mults``. init_dim: width after the first conv.
        channels: of the image. out_dim: of the output. self_condition: the input also takes an estimate of
            x0, in front of x; zeros where none is given.
        full_attn: for each level, whether its attention is full or linear. attn_heads, attn_dim_head: for
            each level; the middle has the last level's.
        mem_kv: learned keys and values of each attention; 0 in versions before 1.9.
        norm: of the conv blocks: "rms" from 2.0 on, "group" before. groups: for "group".
        attention_norm: "rms" from 1.7 on, "layer" before. average: linear attention averages, up to 1.7.3.
        strided: convs of stride 2 go down, in 0.x. theta: base of the sinusoidal time embedding.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_mults: Sequence[int],
        channels: int,
        out_dim: int,
        full_attn: Sequence[bool],
        attn_heads: Sequence[int],
        attn_dim_head: Sequence[int],
        init_dim: int | None = None,
        self_condition: bool = False,
        mem_kv: int = 4,
        norm: NormKind = "rms",
        groups: int = 8,
        attention_norm: AttentionNorm = "rms",
        average: bool = False,
        strided: bool = False,
        theta: float = 10000,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(channels)
        first, embedding = init_dim or dim, 4 * dim
        widths = [first, *(dim * mult for mult in dim_mults)]
        self.self_condition, self.levels = self_condition, len(dim_mults)
        attention = list(zip(full_attn, attn_heads, attn_dim_head, strict=True))
        if len(attention) != self.levels:
            raise ValueError(f"attention is given for {len(attention)} levels of {self.levels}")

        def block(before: int, after: int) -> LucidrainsResnetBlock:
            return LucidrainsResnetBlock(before, after, embedding, norm, groups, dropout)

        def attend(level: int, width: int, full: bool) -> nn.Module:
            size = AttentionSize(attention[level][1], attention[level][2], mem_kv, attention_norm)
            return FullAttention(width, size) if full else LinearAttention(width, size, average)

        taken = channels * (2 if self_condition else 1)
        self.init_conv = with_role(nn.Conv2d(taken, first, 7, padding=3), "stem")
        self.time_mlp = nn.Sequential(
            SinusoidalTime(dim, theta), *embedding_layers(dim, embedding, activation=nn.GELU())
        )

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        last = self.levels - 1
        for i, (width, after) in enumerate(pairwise(widths)):
            resample = conv3x3(width, after, "resample") if i == last else downsample(width, after, strided)
            parts = [block(width, width), block(width, width), attend(i, width, attention[i][0]), resample]
            self.downs.append(nn.ModuleList(parts))
        self.mid_block1 = block(widths[-1], widths[-1])
        self.mid_attn = attend(last, widths[-1], True)
        self.mid_block2 = block(widths[-1], widths[-1])
        for i in reversed(range(self.levels)):
            before, width = widths[i], widths[i + 1]
            up = Upsample(width, out_channels=before, name="1") if i else None
            resample = up or conv3x3(width, before, "resample")
            parts = [block(width + before, width), block(width + before, width)]
            self.ups.append(nn.ModuleList([*parts, attend(i, width, attention[i][0]), resample]))

        self.join = SkipJoin()
        self.final_res_block = LucidrainsResnetBlock(2 * first, first, embedding, norm, groups, dropout)
        self.final_conv = with_role(nn.Conv2d(first, out_dim, 1), "head")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        x_self: Tensor | None = None,
    ) -> Tensor:
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self is None else x_self, x], dim=1)
        h = first = self.init_conv(x)
        embedding = self.time_mlp(t)

        skips = []
        for level in self.downs:
            block1, block2, attention, resample = level.children()
            skips.append(block1(h, embedding))
            skips.append(attention(block2(skips[-1], embedding)))
            h = resample(skips[-1])

        h = self.mid_attn(self.mid_block1(h, embedding))
        h = self.mid_block2(h, embedding)

        for level in self.ups:
            block1, block2, attention, resample = level.children()
            h = block1(self.join(h, skips.pop()), embedding)
            h = block2(self.join(h, skips.pop()), embedding)
            h = resample(attention(h))
        h = self.final_res_block(self.join(h, first), embedding)
        return self.final_conv(h)

    def blocks(self) -> list[Block]:
        down, up = (
            [f"{name}.{part}" for name in self.members(section) for part in (0, 2, 3)]
            for section in ("downs", "ups")
        )
        return feature_points(["init_conv", *down], ["mid_block2"], [*up, "final_res_block"])
