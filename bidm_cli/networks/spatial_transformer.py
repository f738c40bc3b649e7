"""The spatial transformer of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): attention between the
positions of a feature map, then from the positions to a context (text, class), then an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Prologue, fused_conv
from bidm_cli.networks.layers import AttentionProduct, attend_heads, with_role


class CrossAttention(nn.Module):
    """Multi-head attention from x [N, L, D] to a context [N, M, E] (to x itself without one) -> [N, L, D]."""

    def __init__(self, width: int, context_width: int | None, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        source = width if context_width is None else context_width
        self.heads = heads
        self.to_q = with_role(nn.Linear(width, inner, bias=False), "attention_qkv")
        self.to_k = with_role(nn.Linear(source, inner, bias=False), "attention_qkv")
        self.to_v = with_role(nn.Linear(source, inner, bias=False), "attention_qkv")
        self.to_out = nn.Sequential(with_role(nn.Linear(inner, width), "attention_out"), nn.Dropout(0.0))
        self.product = AttentionProduct()

    def forward(self, x: Tensor, context: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        attended = attend_heads(self.product, self.heads, q, k, v)
        return fused_conv(self.to_out[0], attended, residual=residual)


class GEGLU(nn.Module):
    """value * GELU(gate), both from one linear layer: [N, L, D] -> [N, L, out] (arXiv 2002.05202)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = with_role(nn.Linear(width, 2 * out), "feed_forward")

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back: [N, L, D] -> [N, L, D]."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        down = with_role(nn.Linear(4 * width, width), "feed_forward")
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), down)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused_conv(self.net[2], self.net[1](self.net[0](x)), residual=residual)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each after a LayerNorm and with a residual.

    Without ``self_attention`` the first attention is to the context, too.
    """

    def __init__(
        self, width: int, context_width: int | None, heads: int, head_width: int, self_attention: bool = True
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.attn1 = CrossAttention(width, None if self_attention else context_width, heads, head_width)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_width, heads, head_width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), None if self.self_attention else context, residual=x)
        x = self.attn2(self.norm2(x), context, residual=x)
        return self.ff(self.norm3(x), residual=x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the H*W positions of a map, with a residual: [N, C, H, W] -> [N, C, H, W].

    Args:
        context_widths: the context's width for each block; None makes that block attend to x itself.
        linear: project in and out by linear layers on tokens (Stable Diffusion 2) instead of 1x1 convs.
        self_attention: see :class:`BasicTransformerBlock`.
        groups: of the group norm.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_width: int,
        context_widths: Sequence[int | None],
        linear: bool = False,
        self_attention: bool = True,
        groups: int = 32,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = with_role(_projection(channels, inner, linear), "transformer_in")
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, width, heads, head_width, self_attention) for width in context_widths
        )
        self.proj_out = with_role(_projection(inner, channels, linear), "transformer_out")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _, _, height, width = x.shape
        if self.linear:
            h = self.proj_in(_tokens(self.norm(x)))
        else:
            h = _tokens(fused_conv(self.proj_in, x, prologue=Prologue(self.norm)))
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            return _image(fused_conv(self.proj_out, h, residual=_tokens(x)), height, width)
        return fused_conv(self.proj_out, _image(h, height, width), residual=x)


def _projection(inputs: int, outputs: int, linear: bool) -> nn.Module:
    return nn.Linear(inputs, outputs) if linear else nn.Conv2d(inputs, outputs, 1)


def _tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H*W, C]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """[N, H*W, C] -> [N, C, H, W], channels-last in memory, without a copy."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
