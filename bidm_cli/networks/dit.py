"""DiT, the diffusion transformer (Peebles and Xie 2022, arXiv 2212.09748), with facebookresearch/DiT's names.

Weights load with ``load_state_dict(strict=True)``.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from bidm_cli.networks.fusion import fused_conv
from bidm_cli.networks.layers import (
    AttentionProduct,
    Block,
    DenoisingNetwork,
    NetworkInputs,
    attend_heads,
    embedding_layers,
    sinusoidal_embedding,
    with_role,
)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without a scale or shift of its own: adaLN gives both."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def modulation(width: int, parts: int) -> nn.Sequential:
    """adaLN: the conditioning vector [N, D] to ``parts`` vectors [N, parts * D]."""
    return nn.Sequential(nn.SiLU(), with_role(nn.Linear(width, parts * width), "time_projection"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift for tokens x [N, L, D] and vectors [N, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """Timesteps [N] to vectors [N, D]: sinusoids, linear, SiLU, linear."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(*embedding_layers(frequencies, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal_embedding(t, self.frequencies, order="cos_sin", divisor_offset=0))


class Attention(nn.Module):
    """Multi-head self-attention over tokens, [N, L, D] -> [N, L, D]."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split into {heads} heads")
        self.heads = heads
        self.qkv = with_role(nn.Linear(width, 3 * width, bias=qkv_bias), "attention_qkv")
        self.product = AttentionProduct()
        self.proj = with_role(nn.Linear(width, width), "attention_out")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        attended = attend_heads(self.product, self.heads, *self.qkv(x).chunk(3, dim=-1))
        return fused_conv(self.proj, attended, residual=residual)


class FeedForward(Mlp):
    """timm's two-layer MLP with GELU ("tanh" or "none", exact) and this package's roles."""

    def __init__(self, width: int, hidden: int, approximate: str) -> None:
        super().__init__(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        with_role(self.fc1, "feed_forward")
        with_role(self.fc2, "feed_forward")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused_conv(self.fc2, self.act(self.fc1(x)), residual=residual)


def patch_embedding(size: int, patch: int, channels: int, width: int) -> tuple[PatchEmbed, int]:
    """timm's patch embedding, [N, C, H, W] -> [N, L, D], whose conv is the stem; patches along a side.

    Raises:
        ValueError: the size is no multiple of the patch's.
    """
    if size % patch:
        raise ValueError(f"an input of {size} cannot be cut into patches of {patch}")
    embed = PatchEmbed(size, patch, channels, width, strict_img_size=False)
    with_role(embed.proj, "stem")
    return embed, size // patch


def embedded_labels(table: Any, t: Tensor, y: Tensor | None) -> Tensor:
    """Rows y [N] of the table, [N, D]; without labels its last, the null label where there is one."""
    return table(torch.full_like(t, table.num_embeddings - 1, dtype=torch.long) if y is None else y)


def image_of(patches: Tensor, p: int, side: int) -> Tensor:
    """Patches [N, side side, p p C] (channels fastest) to [N, C, side p, side p]."""
    cut = patches.unflatten(2, (p, p, -1)).unflatten(1, (side, side))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class DiTBlock(nn.Module):
    """x + gate attention(modulated norm x), then the same with the MLP; the six vectors come from c."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = FeedForward(width, hidden, "tanh")
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens [N, L, D] to patches [N, L, outputs]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(width)
        self.linear = with_role(nn.Linear(width, outputs), "head")
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Blocks(nn.ModuleList):
    """DiT's ``blocks``: the list of its blocks and, called, their feature points.

    The weights' names take the word that :class:`DenoisingNetwork` has for its method, so one object is both.
    """

    def __call__(self) -> list[Block]:  # type: ignore[override]
        middle = len(self) // 2
        stages = ["encoder"] * middle + ["middle"] * (len(self) % 2) + ["decoder"] * middle
        return [Block(f"blocks.{i}", stage) for i, stage in enumerate(stages)]  # type: ignore[arg-type]


class DiT(DenoisingNetwork):
    """The whole network: patches, ``depth`` blocks, patches back.

    Its blocks all work on the same tokens [N, L, D]; the first half counts as encoder, the second as decoder.

    Args:
        input_size: H = W of what it denoises. patch_size: side of a patch.
        out_channels: 2 * in_channels where the variance is learned.
        label_rows: of the label table, the null label included.
        mlp_width: hidden width of the MLPs; 4 * hidden_size by default.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        out_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        label_rows: int,
        mlp_width: int | None = None,
        frequencies: int = 256,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(in_channels)
        self.patch_size = patch_size
        self.x_embedder, self.side = patch_embedding(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequencies)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(label_rows, hidden_size)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.side**2, hidden_size))
        hidden = mlp_width or 4 * hidden_size
        self.blocks = Blocks(DiTBlock(hidden_size, num_heads, hidden) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels)

    @property
    def blocks(self) -> Blocks:  # type: ignore[override]
        """The blocks; ``blocks()`` gives their feature points."""
        return self._modules["blocks"]  # type: ignore[return-value]

    @blocks.setter
    def blocks(self, value: Blocks) -> None:
        self._modules["blocks"] = value

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        labels = self.y_embedder["embedding_table"]
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + embedded_labels(labels, t, y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return image_of(self.final_layer(tokens, c), self.patch_size, self.side)
