"""CLIP's text transformer (arXiv 2103.00020) under the names of Hugging Face's ``CLIPTextModel``.

This is what Stable Diffusion 1 attends to: the last layer's output after the final norm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.layers import attend_heads


class Attention(nn.Module):
    """Multi-head self-attention, [N, L, width] -> [N, L, width]; ``inner``: width of q, k and v.

    ``names`` are those of the projections to q, k and v, which ``bias`` is of, and of the result's.
    """

    def __init__(
        self, width: int, inner: int, heads: int, names: Sequence[str], bias: bool = True, causal: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.names, self.causal = heads, names, causal
        for name in names[:3]:
            self.add_module(name, nn.Linear(width, inner, bias=bias))
        self.add_module(names[3], nn.Linear(inner, width))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v, out = (getattr(self, name) for name in self.names)
        product = partial(F.scaled_dot_product_attention, is_causal=self.causal)
        return out(attend_heads(product, self.heads, q(h), k(h), v(h)))


def two_layers(width: int, hidden: int, names: tuple[str, str], activation: nn.Module) -> nn.Module:
    """MLP to ``hidden`` channels and back, with names for its linear layers."""
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
    return nn.Sequential(OrderedDict([(names[0], first), ("activation", activation), (names[1], second)]))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CLIPTextEncoder(nn.Module):
    """Token numbers [N, L] to embeddings [N, L, D].

    Args:
        vocabulary: rows of the token table. length: longest text, in tokens. hidden: width inside the MLPs.
        activation: "quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP's).
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
        tables = {"token_embedding": vocabulary, "position_embedding": length}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(rows, width) for name, rows in tables.items()})

        def layer() -> nn.Module:
            norms = {name: nn.LayerNorm(width) for name in ("layer_norm1", "layer_norm2")}
            attention = Attention(width, width, heads, ("q_proj", "k_proj", "v_proj", "out_proj"))
            gelu = QuickGELU() if activation == "quick_gelu" else nn.GELU()
            mlp = two_layers(width, hidden, ("fc1", "fc2"), gelu)
            return nn.ModuleDict({**norms, "self_attn": attention, "mlp": mlp})

        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(layers))})
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.embeddings["token_embedding"](tokens) + self.embeddings["position_embedding"](positions)
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined, union-attr]
            h = h + layer["self_attn"](layer["layer_norm1"](h))
            h = h + layer["mlp"](layer["layer_norm2"](h))
        return self.final_layer_norm(h)
