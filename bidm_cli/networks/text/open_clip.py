"""OpenCLIP's text transformer under its own names, as Stable Diffusion 2's files keep it.

    encoder = OpenCLIPTextEncoder(vocabulary=49408, width=1024, layers=24, heads=16, hidden=4096, skip=1)
    context = encoder(tokens)          # token numbers [N, 77] to embeddings [N, 77, 1024]

It computes what :mod:`bidm_cli.networks.text.clip` does with an exact GELU; Stable Diffusion 2 attends to the
last layer but one, after the final norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OpenCLIPTextEncoder(nn.Module):
    """Token numbers [N, L] to embeddings [N, L, D].

    Args:
        vocabulary: rows of the token table. length: longest text, in tokens. hidden: width inside the MLPs.
        skip: how many of the last layers are left out.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        length: int = 77,
        skip: int = 0,
    ) -> None:
        super().__init__()
        if width % heads or not 0 <= skip < max(layers, 1):
            raise ValueError(f"{heads} heads of a width of {width}, {skip} of {layers} layers left out")
        self.length, self.skip = length, skip
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.token_embedding = nn.Embedding(vocabulary, width)
        blocks = [_Block(width, heads, hidden) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        blocks = list(self.transformer["resblocks"])  # type: ignore[call-overload]
        for block in blocks[: len(blocks) - self.skip]:
            h = block(h)
        return self.ln_final(h)


class _Block(nn.Module):
    """Pre-norm block with causal attention."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.ln_1(h))
        return h + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(h))))


class _Attention(nn.Module):
    """The weights of ``nn.MultiheadAttention``: queries, keys and values in one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        projected = F.linear(h, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))
