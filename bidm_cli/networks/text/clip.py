"""CLIP's text transformer (arXiv 2103.00020) under the names of Hugging Face's ``CLIPTextModel``.

    encoder = CLIPTextEncoder(vocabulary=49408, width=768, layers=12, heads=12, hidden=3072)
    context = encoder(tokens)          # token numbers [N, 77] to embeddings [N, 77, 768]

This is what Stable Diffusion 1 attends to: the last layer's output after the final norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CLIPTextEncoder(nn.Module):
    """Token numbers [N, L] to embeddings [N, L, D].

    Args:
        vocabulary: rows of the token table. length: longest text, in tokens. hidden: width inside the MLPs.
        activation: "quick_gelu" (x sigmoid(1.702 x), OpenAI's CLIP) or "gelu" (OpenCLIP's).
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        length: int = 77,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        if width % heads or activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"{heads} heads of a width of {width}, activation {activation!r}")
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(vocabulary, width),
                "position_embedding": nn.Embedding(length, width),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList([_Layer(width, heads, hidden, activation) for _ in range(layers)])}
        )
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.embeddings["token_embedding"](tokens) + self.embeddings["position_embedding"](positions)
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined, union-attr]
            h = layer(h)
        return self.final_layer_norm(h)


class _Layer(nn.Module):
    """Pre-norm block with causal attention."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = _Attention(width, heads)
        self.mlp = _MLP(width, hidden, activation)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp(self.layer_norm2(h))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        n, length, width = h.shape
        q, k, v = (
            project(h).reshape(n, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).reshape(n, length, width))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.quick = activation == "quick_gelu"

    def forward(self, h: Tensor) -> Tensor:
        h = self.fc1(h)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
