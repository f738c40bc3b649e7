"""U-ViT, a transformer with long skips (Bao et al. 2022, arXiv 2209.12152), with baofff/U-ViT's names.

Weights load with ``load_state_dict(strict=True)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.dit import Attention, FeedForward, embedded_labels, image_of, patch_embedding
from bidm_cli.networks.layers import (
    Block,
    DenoisingNetwork,
    NetworkInputs,
    conv3x3,
    embedding_layers,
    feature_points,
    sinusoidal_embedding,
    with_role,
)


class UViTBlock(nn.Module):
    """Pre-norm transformer block; with ``skip``, first a linear layer from (x, skip), [N, L, 2D] to D."""

    def __init__(self, width: int, heads: int, hidden: int, qkv_bias: bool, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden, "none")
        self.skip_linear = with_role(nn.Linear(2 * width, width), "skip") if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = self.attn(self.norm1(x), residual=x)
        return self.mlp(self.norm2(x), residual=x)


class UViT(DenoisingNetwork):
    """The whole network; time, and the label or the context's tokens, are tokens in front of the patches.

    Args:
        img_size: H = W of what it denoises. half_depth: blocks on each side of the middle one.
        label_rows: of the label table; None for a network without classes.
        context_dim, context_tokens: width and number of the embeddings of a text-conditional network.
        time_scale: the time token is made of (t + 1) * time_scale for the schedule's index t: the original
            counts steps from 1, and its pixel models (time 0 to 1) multiply by 999.
        mlp_time_embed, conv, skip, qkv_bias: as in the original.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        half_depth: int,
        num_heads: int,
        mlp_width: int | None = None,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        label_rows: int | None = None,
        context_dim: int | None = None,
        context_tokens: int = 77,
        conv: bool = True,
        skip: bool = True,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed_dim, self.patch_size = embed_dim, patch_size
        self.context_tokens = 0 if context_dim is None else context_tokens
        self.inputs = NetworkInputs(in_chans, context_dim, self.context_tokens or None)
        self.extras, self.time_scale = 1 + (label_rows is not None) + self.context_tokens, time_scale
        hidden = mlp_width or 4 * embed_dim
        self.patch_embed, self.side = patch_embedding(img_size, patch_size, in_chans, embed_dim)
        self.time_embed: nn.Module = nn.Identity()
        if mlp_time_embed:
            self.time_embed = nn.Sequential(*embedding_layers(embed_dim, 4 * embed_dim, embed_dim))
        self.label_emb = None if label_rows is None else nn.Embedding(label_rows, embed_dim)
        self.context_embed = None
        if context_dim is not None:
            self.context_embed = with_role(nn.Linear(context_dim, embed_dim), "transformer_in")
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.extras + self.side**2, embed_dim))

        def block(with_skip: bool = False) -> UViTBlock:
            return UViTBlock(embed_dim, num_heads, hidden, qkv_bias, with_skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(half_depth))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(half_depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = with_role(nn.Linear(embed_dim, patch_size**2 * in_chans), "head")
        self.final_layer: nn.Module = nn.Identity()
        if conv:
            self.final_layer = conv3x3(in_chans, in_chans, "head")

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        h = torch.cat([*self._extra_tokens(t, context, y), self.patch_embed(x)], dim=1) + self.pos_embed

        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        patches = self.decoder_pred(self.norm(h))[:, self.extras :]
        return self.final_layer(image_of(patches, self.patch_size, self.side))

    def _extra_tokens(self, t: Tensor, context: Tensor | None, y: Tensor | None) -> list[Tensor]:
        """Label, time and context tokens, [N, ., D] each, in their order.

        Raises:
            BidmError: the network needs a context of another length, or one at all.
        """
        time = (t.float() + 1) * self.time_scale
        embedding = sinusoidal_embedding(time, self.embed_dim, order="cos_sin", divisor_offset=0)
        tokens = [self.time_embed(embedding)[:, None]]
        if self.label_emb is not None:
            tokens.insert(0, embedded_labels(self.label_emb, t, y)[:, None])
        if self.context_embed is not None:
            if context is None or context.shape[1] != self.context_tokens:
                found = "none" if context is None else str(context.shape[1])
                raise BidmError(
                    f"this network takes contexts of {self.context_tokens} tokens (`context`), not {found}"
                )
            tokens.append(self.context_embed(context))
        return tokens

    def blocks(self) -> list[Block]:
        return feature_points(self.members("in_blocks"), ["mid_block"], self.members("out_blocks"))
