"""OpenCLIP's text transformer under its own names, as Stable Diffusion 2's files keep it.

It computes what :mod:`bidm_cli.networks.text.clip` does with an exact GELU; Stable Diffusion 2 attends to the
last layer but one, after the final norm.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.layers import attend_heads
from bidm_cli.networks.text.clip import two_layers


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

        def block() -> nn.Module:
            mlp = two_layers(width, hidden, ("c_fc", "c_proj"), nn.GELU())
            norms = {name: nn.LayerNorm(width) for name in ("ln_1", "ln_2")}
            return nn.ModuleDict({**norms, "attn": _Attention(width, heads), "mlp": mlp})

        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(block() for _ in range(layers))})
        self.ln_final = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        blocks = list(self.transformer["resblocks"])  # type: ignore[call-overload]
        for block in blocks[: len(blocks) - self.skip]:
            h = h + block["attn"](block["ln_1"](h))
            h = h + block["mlp"](block["ln_2"](h))
        return self.ln_final(h)


class _Attention(nn.Module):
    """The weights of ``nn.MultiheadAttention``: queries, keys and values in one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = F.linear(h, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        product = partial(F.scaled_dot_product_attention, is_causal=True)
        return self.out_proj(attend_heads(product, self.heads, q, k, v))
