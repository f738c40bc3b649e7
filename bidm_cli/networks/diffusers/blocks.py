"""The building blocks of diffusers' ``UNet2DModel``, ``VQModel`` and ``AutoencoderKL`` under their own names.

Everything a ``config.json`` can vary is an argument: norm groups and eps, FiLM, heads, padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bidm_cli.networks.fusion import Features, fused_conv, fuses
from bidm_cli.networks.layers import AttentionProduct, attend_heads, with_role
from bidm_cli.networks.unet_blocks import Level, Resample, ResidualBlock, residual_layers, skip_conv


@dataclass(frozen=True)
class Style:
    """Settings that all blocks of a network share.

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


class ResnetBlock2D(ResidualBlock):
    """Residual block, with the time embedding if the style has one; the sum is divided by ``scale``."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        style: Style,
        resample: Resample | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample, self.film, self.scale = resample, style.film, scale
        layers = residual_layers(
            style.norm, channels, out_channels, style.embedding, film=style.film, dropout=style.dropout
        )
        self.norm1, self.conv1, self.time_emb_proj, self.norm2, self.dropout, self.conv2 = layers
        self.conv_shortcut = skip_conv(channels, out_channels)

    def layers(self) -> Sequence[nn.Module]:
        first = self.norm1, self.conv1, self.time_emb_proj
        return *first, self.norm2, self.dropout, self.conv2, self.conv_shortcut

    def forward(self, x: Features, embedding: Tensor | None = None) -> Tensor:
        h = super().forward(x, embedding)
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

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = x.flatten(2)
        h = (h if self.group_norm is None else self.group_norm(h)).transpose(1, 2)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        attended = attend_heads(self.product, self.heads, q, k, v)
        out, tokens = self.to_out[0], x.flatten(2).transpose(1, 2)
        # Layouts in memory are the library's, too (the sum is channels-last): sums then round as its do.
        h = fused_conv(out, attended, residual=tokens) if fuses(out) else self.to_out(attended) + tokens
        h = h.transpose(1, 2).reshape(x.shape)
        return h if self.scale == 1.0 else h / self.scale


def level(
    inputs: Sequence[int],
    width: int,
    style: Style,
    attentions: Sequence[nn.Module],
    resampler: tuple[str, nn.Module] | None,
) -> Level:
    """One resolution, ``width`` channels wide; ``inputs``: channels into each block."""
    resnets = [ResnetBlock2D(channels, width, style) for channels in inputs]
    return Level({"attentions": attentions, "resnets": resnets}, ("resnets", "attentions"), resampler)


class MidBlock2D(nn.Module):
    """Block, attention, block at the coarsest resolution; ``blocks`` 1: nothing but one block.

    Args:
        attention: an :class:`Attention` or a spatial transformer; None for none.
        scale: the sums of the blocks are divided by it.
    """

    def __init__(
        self, channels: int, style: Style, attention: nn.Module | None, scale: float = 1.0, blocks: int = 2
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([] if attention is None else [attention])
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, style, None, scale) for _ in range(blocks)
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, embedding)
        for attention in self.attentions:
            x = attention(x, context)
        for block in list(self.resnets)[1:]:
            x = block(x, embedding)
        return x
