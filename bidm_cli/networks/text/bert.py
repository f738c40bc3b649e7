"""The text transformer of CompVis' latent diffusion (``BERTEmbedder``), trained with the model itself."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from bidm_cli.networks.text.clip import Attention

HEAD = 64
"""Channels of a head."""


class LDMTextEncoder(nn.Module):
    """Token numbers [N, L] to embeddings [N, L, D]; every token attends to all.

    Args:
        vocabulary: rows of the token table. length: longest text, in tokens. heads: of 64 channels each.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, length: int = 77, heads: int = 8, mult: int = 4
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(length, width)})
        names = ("to_q", "to_k", "to_v", "to_out")
        blocks: list[nn.Module] = []
        for _ in range(layers):
            attention = Attention(width, heads * HEAD, heads, names, bias=False, causal=False)
            first = nn.Sequential(nn.Linear(width, mult * width), nn.GELU())
            mlp = nn.Sequential(first, nn.Dropout(0.0), nn.Linear(mult * width, width))
            for layer in (attention, nn.Sequential(OrderedDict(net=mlp))):
                blocks.append(nn.ModuleList([nn.LayerNorm(width), layer]))
        self.attn_layers = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.token_emb(tokens) + self.pos_emb["emb"](positions)
        for norm, layer in self.attn_layers["layers"]:  # type: ignore[attr-defined, union-attr]
            h = h + layer(norm(h))
        return self.norm(h)
