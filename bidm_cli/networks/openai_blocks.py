"""The building blocks of the OpenAI U-Net (Dhariwal and Nichol 2021, arXiv 2105.05233) under their own names.

improved-diffusion, guided-diffusion and latent diffusion share them. Original zero initialisations are left
out: weights come from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bidm_cli.networks.fusion import Features, Prologue, fused_conv, fuses, joined
from bidm_cli.networks.layers import AttentionProduct, with_role
from bidm_cli.networks.spatial_transformer import SpatialTransformer
from bidm_cli.networks.unet_blocks import Resample, ResidualBlock, residual_layers, skip_conv


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm as this family has it: 32 groups, eps 1e-5."""
    return nn.GroupNorm(32, channels, eps=1e-5)


class ResBlock(ResidualBlock):
    """Residual block with the time embedding; ``film`` and ``resample`` as in :class:`ResidualBlock`."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        *,
        film: bool = False,
        resample: Resample | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.film, self.resample = film, resample
        norm1, conv1, projection, norm2, drop, conv2 = residual_layers(
            group_norm, channels, out_channels, embedding, film=film, dropout=dropout
        )
        self.in_layers = nn.Sequential(norm1, nn.SiLU(), conv1)
        self.emb_layers = nn.Sequential(nn.SiLU(), projection)
        self.out_layers = nn.Sequential(norm2, nn.SiLU(), drop, conv2)
        self.skip_connection = skip_conv(channels, out_channels)

    def layers(self) -> Sequence[nn.Module]:
        (norm1, _, conv1), (norm2, _, dropout, conv2) = self.in_layers, self.out_layers
        return norm1, conv1, self.emb_layers[1], norm2, dropout, conv2, self.skip_connection


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual: [N, C, H, W] -> [N, C, H, W].

    Args:
        new_order: rows of ``qkv`` are all queries, all keys, all values; otherwise (the older codes) they
            are the query, key and value of the first head, then of the second, ...
    """

    def __init__(self, channels: int, heads: int, new_order: bool = False) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"attention over {channels} channels cannot have {heads} heads")
        self.heads, self.new_order = heads, new_order
        self.norm = group_norm(channels)
        self.qkv = with_role(nn.Conv1d(channels, 3 * channels, 1), "attention_qkv")
        self.product = AttentionProduct()
        self.proj_out = with_role(nn.Conv1d(channels, channels, 1), "attention_out")

    def forward(self, x: Tensor) -> Tensor:
        flat, norm = x.flatten(2), Prologue(self.norm)
        # Otherwise the norm takes the image as it is: channels-last, it would have to be copied.
        fused = fuses(self.qkv, norm)
        qkv = fused_conv(self.qkv, flat, prologue=norm) if fused else self.qkv(norm(x).flatten(2))
        # Contiguous [N, L, 3C]: torch's fused attention wants the head width innermost.
        qkv = qkv.transpose(1, 2).contiguous()
        if self.new_order:
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        else:
            q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).unbind(3)
        attended = self.product(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        attended = attended.transpose(2, 3).flatten(1, 2)
        return fused_conv(self.proj_out, attended, residual=flat).reshape(x.shape)


class Stage(nn.Sequential):
    """Layers in a row; each gets what it takes of time embedding and context."""

    def forward(  # type: ignore[override]
        self, x: Features, embedding: Tensor, context: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return joined(x)
