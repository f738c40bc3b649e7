"""diffusers' ``VQModel`` and ``AutoencoderKL`` under their own key names: first stages as in
:mod:`bidm_cli.networks.autoencoder`, images [N, 3, H, W] in [-1, 1] to latents [N, C, H/f, W/f] and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.autoencoder import Codebook
from bidm_cli.networks.diffusers.blocks import (
    Attention,
    Downsample2D,
    Level,
    MidBlock2D,
    ResnetBlock2D,
    Style,
    Upsample2D,
)
from bidm_cli.networks.layers import with_role


class Encoder(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H/f, W/f], f = 2^(len(widths) - 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        depth: int,
        style: Style,
        attention: Sequence[int],
        mid_attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = with_role(nn.Conv2d(in_channels, widths[0], 3, padding=1), "stem")
        self.down_blocks, width = nn.ModuleList(), widths[0]
        for i, out in enumerate(widths):
            resnets = [ResnetBlock2D(width if j == 0 else out, out, style) for j in range(depth)]
            attentions = [Attention(out, style) for _ in resnets] if i in attention else []
            way = None if i == len(widths) - 1 else ("downsamplers", Downsample2D(out, 0))
            self.down_blocks.append(Level(resnets, attentions, way))
            width = out
        self.mid_block = MidBlock2D(width, style, Attention(width, style) if mid_attention else None)
        self.conv_norm_out = style.norm(width)
        self.conv_out = with_role(nn.Conv2d(width, out_channels, 3, padding=1), "head")

    def forward(self, x: Tensor) -> Tensor:
        h = _through(self.down_blocks, self.conv_in(x))
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """[N, in_channels, h, w] -> [N, out_channels, f h, f w]; ``widths`` and levels are finest first."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        depth: int,
        style: Style,
        attention: Sequence[int],
        mid_attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = with_role(nn.Conv2d(in_channels, widths[-1], 3, padding=1), "stem")
        self.mid_block = MidBlock2D(
            widths[-1], style, Attention(widths[-1], style) if mid_attention else None
        )
        self.up_blocks, width = nn.ModuleList(), widths[-1]
        for i in reversed(range(len(widths))):
            out = widths[i]
            resnets = [ResnetBlock2D(width if j == 0 else out, out, style) for j in range(depth + 1)]
            attentions = [Attention(out, style) for _ in resnets] if i in attention else []
            self.up_blocks.append(Level(resnets, attentions, ("upsamplers", Upsample2D(out)) if i else None))
            width = out
        self.conv_norm_out = style.norm(width)
        self.conv_out = with_role(nn.Conv2d(width, out_channels, 3, padding=1), "head")

    def forward(self, z: Tensor) -> Tensor:
        h = _through(self.up_blocks, self.mid_block(self.conv_in(z)))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _through(levels: nn.ModuleList, h: Tensor) -> Tensor:
    for level in levels:
        assert isinstance(level, Level)
        for j in range(len(level.resnets)):
            h = level.block(j, h)
        h = level.resampled(h)
    return h


class _Codebook(Codebook):
    def distances(self, rows: Tensor) -> Tensor:
        # As diffusers does: between codes that are almost as near its rounding decides, and so must ours.
        return torch.cdist(rows, self.embedding.weight)


class DiffusersVQ(nn.Module):
    """``VQModel``: latents are continuous, decoding rounds them to the nearest code.

    Args:
        block_out_channels: width of each resolution, finest first.
        encoder_attention_levels, decoder_attention_levels: those with attention after each block.
        latent_channels: between encoder or decoder and the 1x1 convs; ``embed_dim``: of the latents.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int],
        layers_per_block: int = 1,
        encoder_attention_levels: Sequence[int] = (),
        decoder_attention_levels: Sequence[int] = (),
        latent_channels: int,
        embed_dim: int,
        n_embed: int,
        norm_num_groups: int = 32,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        style = Style(norm_num_groups, 1e-6)
        shape = (block_out_channels, layers_per_block, style)
        self.encoder = Encoder(in_channels, latent_channels, *shape, encoder_attention_levels, mid_attention)
        self.quant_conv = nn.Conv2d(latent_channels, embed_dim, 1)
        self.quantize = _Codebook(n_embed, embed_dim)
        self.post_quant_conv = nn.Conv2d(embed_dim, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, *shape, decoder_attention_levels, mid_attention)

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to latents [N, embed_dim, H/f, W/f]."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [N, embed_dim, h, w] to images [N, 3, f h, f w]."""
        return self.decoder(self.post_quant_conv(self.quantize(z)))


class DiffusersKL(nn.Module):
    """``AutoencoderKL``: :meth:`encode` gives the posterior's mean, so it is deterministic.

    Arguments as :class:`DiffusersVQ`'s; ``quant_conv`` and ``post_quant_conv`` are missing in newer ones.
    Latents are given as (z - latents_mean) / latents_std, one number for each of their channels.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int],
        layers_per_block: int = 1,
        encoder_attention_levels: Sequence[int] = (),
        decoder_attention_levels: Sequence[int] = (),
        latent_channels: int,
        norm_num_groups: int = 32,
        mid_attention: bool = True,
        quant_conv: bool = True,
        post_quant_conv: bool = True,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise ValueError(f"{name} has {len(values)} numbers for {latent_channels} channels")
        self.latents_mean, self.latents_std = latents_mean, latents_std
        style, z = Style(norm_num_groups, 1e-6), latent_channels
        shape = (block_out_channels, layers_per_block, style)
        self.encoder = Encoder(in_channels, 2 * z, *shape, encoder_attention_levels, mid_attention)
        self.decoder = Decoder(z, out_channels, *shape, decoder_attention_levels, mid_attention)
        self.quant_conv: nn.Module = nn.Conv2d(2 * z, 2 * z, 1) if quant_conv else nn.Identity()
        self.post_quant_conv: nn.Module = nn.Conv2d(z, z, 1) if post_quant_conv else nn.Identity()

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to latents [N, latent_channels, H/f, W/f]."""
        mean, _ = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        if self.latents_mean is not None:
            mean = mean - _per_channel(self.latents_mean, mean)
        return mean if self.latents_std is None else mean / _per_channel(self.latents_std, mean)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [N, latent_channels, h, w] to images [N, 3, f h, f w]."""
        if self.latents_std is not None:
            z = z * _per_channel(self.latents_std, z)
        if self.latents_mean is not None:
            z = z + _per_channel(self.latents_mean, z)
        return self.decoder(self.post_quant_conv(z))


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
