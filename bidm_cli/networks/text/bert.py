"""The text transformer of CompVis' latent diffusion (``BERTEmbedder``), trained with the model itself.

encoder = LDMTextEncoder(vocabulary=30522, width=1280, layers=32)
context = encoder(tokens)          # token numbers [N, 77] to embeddings [N, 77, 1280]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64
"""Channels of a head."""


class LDMTextEncoder(nn.Module):
    """Token numbers [N, L] to embeddings [N, L, D]: pre-norm blocks, every token attends to all.

    Args:
        vocabulary: rows of the token table. length: longest text, in tokens. heads: of 64 channels each.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, length: int = 77, heads: int = 8, mult: int = 4
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(length, width)})
        blocks: list[nn.Module] = []
        for _ in range(layers):
            blocks.append(nn.ModuleList([nn.LayerNorm(width), _Attention(width, heads)]))
            blocks.append(nn.ModuleList([nn.LayerNorm(width), _FeedForward(width, mult)]))
        self.attn_layers = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.token_emb(tokens) + self.pos_emb["emb"](positions)
        for norm, block in self.attn_layers["layers"]:  # type: ignore[attr-defined, union-attr]
            h = h + block(norm(h))
        return self.norm(h)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, heads * HEAD, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * HEAD, width)

    def forward(self, h: Tensor) -> Tensor:
        n, length, _ = h.shape
        q, k, v = (
            project(h).reshape(n, length, -1, HEAD).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).reshape(n, length, -1))


class _FeedForward(nn.Module):
    def __init__(self, width: int, mult: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(width, mult * width), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(0.0), nn.Linear(mult * width, width))

    def forward(self, h: Tensor) -> Tensor:
        return self.net(h)
