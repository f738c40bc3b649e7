"""The building blocks of diffusers' ``UNet2DModel``, ``VQModel`` and ``AutoencoderKL`` under their own names.

Everything a ``config.json`` can vary is an argument: norm groups and eps, FiLM, heads, padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import (
    Features,
    Prologue,
    fused_conv,
    fuses,
    read_in_place,
    resampling_conv,
    shortcut,
)
from bidm_cli.networks.layers import AsymmetricConv2d, AttentionProduct, with_role
from bidm_cli.networks.spatial_transformer import SpatialTransformer


@dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common.

    Attributes:
        groups, eps: of the group norms.
        embedding: width of the time embedding; None for a network without time.
        film: the embedding scales and shifts the second norm's result instead of being added.
        head_width: channels of an attention head; None for a single head.
        dropout: in residual blocks.
    """

    groups: int
    eps: float
    embedding: int | None = None
    film: bool = False
    head_width: int | None = None
    dropout: float = 0.0

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(self.groups, channels, eps=self.eps)


class ResnetBlock2D(nn.Module):
    """norm, SiLU, [resample], conv, time, norm, SiLU, conv, + shortcut: [N, C, H, W] -> [N, O, H', W'].

    Args:
        resample: "up" or "down" changes H and W by 2 inside the block, before the first conv.
        scale: the sum is divided by it.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        style: Style,
        resample: Literal["up", "down"] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample, self.film, self.scale = resample, style.film, scale
        self.norm1 = style.norm(channels)
        self.conv1 = with_role(nn.Conv2d(channels, out_channels, 3, padding=1), "conv")
        if style.embedding is not None:
            width = 2 * out_channels if style.film else out_channels
            self.time_emb_proj = with_role(nn.Linear(style.embedding, width), "time_projection")
        self.norm2 = style.norm(out_channels)
        self.dropout = nn.Dropout(style.dropout)
        self.conv2 = with_role(nn.Conv2d(out_channels, out_channels, 3, padding=1), "conv")
        self.conv_shortcut: nn.Module | None = None
        if channels != out_channels:
            self.conv_shortcut = with_role(nn.Conv2d(channels, out_channels, 1), "skip")

    def forward(self, x: Features, embedding: Tensor | None = None) -> Tensor:
        offset, scale, shift = None, None, None
        if embedding is not None:
            offset = self.time_emb_proj(F.silu(embedding))
            if self.film:
                (scale, shift), offset = offset.chunk(2, dim=1), None
        before = Prologue(self.norm1, silu=True)
        x = read_in_place(self.conv1, x)
        h, x, upsample = resampling_conv(self.conv1, x, before, self.resample, offset)
        between = Prologue(self.norm2, True, scale, shift, self.dropout)
        skip = shortcut(self.conv_shortcut, x, upsample)
        h = fused_conv(self.conv2, h, prologue=between, residual=skip)
        return h if self.scale == 1.0 else h / self.scale


class Attention(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual: [N, C, H, W] -> [N, C, H, W].

    Args:
        groups: of the group norm that comes first; 0 for none, None for the style's.
        scale: the sum is divided by it.
    """

    def __init__(self, channels: int, style: Style, groups: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        width = style.head_width or channels
        self.heads, self.scale = channels // width, scale
        if self.heads < 1:
            raise ValueError(f"attention over {channels} channels cannot have heads of {width}")
        inner = self.heads * width
        groups = style.groups if groups is None else groups
        self.group_norm = nn.GroupNorm(groups, channels, eps=style.eps) if groups else None
        self.to_q = with_role(nn.Linear(channels, inner), "attention_qkv")
        self.to_k = with_role(nn.Linear(channels, inner), "attention_qkv")
        self.to_v = with_role(nn.Linear(channels, inner), "attention_qkv")
        self.to_out = nn.Sequential(with_role(nn.Linear(inner, channels), "attention_out"), nn.Dropout(0.0))
        self.product = AttentionProduct()

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2)
        h = h if self.group_norm is None else self.group_norm(h)
        attended, out, tokens = self.attend(h.transpose(1, 2)), self.to_out[0], x.flatten(2).transpose(1, 2)
        # Layouts in memory are the library's, too (the sum is channels-last): sums then round as its do.
        h = fused_conv(out, attended, residual=tokens) if fuses(out) else self.to_out(attended) + tokens
        h = h.transpose(1, 2).reshape(x.shape)
        return h if self.scale == 1.0 else h / self.scale

    def attend(self, h: Tensor) -> Tensor:
        """The attention before the last projection, [N, L, C] -> [N, L, heads * width]."""
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.product(q, k, v).transpose(1, 2).flatten(2)


class Downsample2D(nn.Module):
    """Halve H and W by a 3x3 stride-2 conv; ``padding`` 1 on all sides, or 0: right and bottom only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        layer: nn.Module = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        if padding == 0:
            layer = AsymmetricConv2d(channels, channels, 3, 2, (0, 1, 0, 1))
        elif padding != 1:
            raise ValueError(f"downsample_padding is {padding}; 0 or 1 make sense")
        self.conv = with_role(layer, "resample")

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Double H and W by nearest neighbour, then a 3x3 conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = with_role(nn.Conv2d(channels, channels, 3, padding=1), "resample")

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return fused_conv(self.conv, x, upsample=2)


class Level(nn.Module):
    """One resolution: residual blocks, each with an attention after it if there are any, and the way on.

    ``attentions`` are :class:`Attention`, or spatial transformers, which get the context.
    ``resampler`` is ("downsamplers" or "upsamplers", module), or None at the last level.
    """

    def __init__(
        self,
        resnets: Sequence[ResnetBlock2D],
        attentions: Sequence[nn.Module],
        resampler: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        # Sections that would be empty are absent, as in the original's state dicts.
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.resampler_name = None
        if resampler is not None:
            self.resampler_name = resampler[0]
            self.add_module(resampler[0], nn.ModuleList([resampler[1]]))
        self.has_attention = bool(attentions)

    def block(
        self, index: int, x: Features, embedding: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Residual block ``index`` and its attention."""
        h = self.resnets[index](x, embedding)
        return _attended(self.attentions[index], h, context) if self.has_attention else h

    def resampled(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x through the down- or upsampler; as it is at the last level."""
        if self.resampler_name is None:
            return x
        return self.get_submodule(f"{self.resampler_name}.0")(x, embedding)


class MidBlock2D(nn.Module):
    """Block, attention, block at the coarsest resolution; ``blocks`` 1: nothing but one block.

    Args:
        attention: an :class:`Attention` or a spatial transformer; None for none.
        scale: the sums of the blocks are divided by it.
    """

    def __init__(
        self,
        channels: int,
        style: Style,
        attention: nn.Module | None,
        scale: float = 1.0,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        if attention is not None:
            self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, style, None, scale) for _ in range(blocks)
        )
        self.has_attention = attention is not None

    def forward(self, x: Tensor, embedding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, embedding)
        if self.has_attention:
            x = _attended(self.attentions[0], x, context)
        for block in list(self.resnets)[1:]:
            x = block(x, embedding)
        return x


def _attended(layer: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    return layer(x, context) if isinstance(layer, SpatialTransformer) else layer(x)
