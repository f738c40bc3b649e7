"""diffusers' ``VQModel`` and ``AutoencoderKL`` under their own key names: first stages as in
:mod:`bidm_cli.networks.autoencoder`, images [N, 3, H, W] in [-1, 1] to latents [N, C, H/f, W/f] and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.networks.autoencoder import Codebook, Coder, FirstStage
from bidm_cli.networks.diffusers.blocks import Attention, MidBlock2D, Style, level
from bidm_cli.networks.layers import by_name_only
from bidm_cli.networks.unet_blocks import Downsample, Level, Upsample


class DiffusersCoder(Coder):
    """Encoder or decoder with diffusers' names."""

    names = ("down_blocks", "up_blocks", "mid_block", "conv_norm_out")
    finest_first = False

    def __init__(
        self,
        channels: tuple[int, int],
        widths: Sequence[int],
        depth: int,
        groups: int,
        mid_attention: bool,
        attention_levels: Sequence[int],
        decodes: bool = False,
    ) -> None:
        super().__init__()
        self.style, self.mid_attention = Style(groups, 1e-6), mid_attention
        self.attention_levels = attention_levels
        self.build(channels, widths[-1] if decodes else widths[0], widths, depth + decodes, decodes)

    def level(self, inputs: Sequence[int], width: int, index: int, resamples: bool) -> Level:
        way: tuple[str, nn.Module] = "downsamplers.0", Downsample(width, padding=0)
        if self.decodes:
            way = "upsamplers.0", Upsample(width)
        attentions = [Attention(width, self.style) for _ in inputs if index in self.attention_levels]
        return level(inputs, width, self.style, attentions, way if resamples else None)

    def middle(self, width: int) -> nn.Module:
        return MidBlock2D(width, self.style, Attention(width, self.style) if self.mid_attention else None)

    def norm(self, channels: int) -> nn.Module:
        return self.style.norm(channels)


class _Codebook(Codebook):
    def distances(self, rows: Tensor, out: Tensor) -> Tensor:
        # As diffusers does: between codes that are almost as near its rounding decides, and so must ours.
        return torch.cdist(rows, self.embedding.weight)


def _coders(
    encoded: int,
    latent: int,
    *,
    block_out_channels: Sequence[int],
    in_channels: int = 3,
    out_channels: int = 3,
    layers_per_block: int = 1,
    encoder_attention_levels: Sequence[int] = (),
    decoder_attention_levels: Sequence[int] = (),
    norm_num_groups: int = 32,
    mid_attention: bool = True,
) -> tuple[DiffusersCoder, DiffusersCoder]:
    """Encoder to ``encoded`` channels and decoder from ``latent``.

    Args:
        block_out_channels: width of each resolution, finest first.
        encoder_attention_levels, decoder_attention_levels: those with attention after each block.
    """
    shape = (block_out_channels, layers_per_block, norm_num_groups, mid_attention)
    encoder = DiffusersCoder((in_channels, encoded), *shape, encoder_attention_levels)
    return encoder, DiffusersCoder((latent, out_channels), *shape, decoder_attention_levels, decodes=True)


class DiffusersVQ(FirstStage):
    """``VQModel``: latents are continuous, decoding rounds them to the nearest code.

    Args:
        latent_channels: between encoder or decoder and the 1x1 convs; ``embed_dim``: of the latents.
        shape: arguments of :func:`_coders`.
    """

    def __init__(self, *, latent_channels: int, embed_dim: int, n_embed: int, **shape: Any) -> None:
        super().__init__()
        self.encoder, decoder = _coders(latent_channels, latent_channels, **shape)
        self.quant_conv = nn.Conv2d(latent_channels, embed_dim, 1)
        self.quantize = _Codebook(n_embed, embed_dim)
        self.post_quant_conv = by_name_only(nn.Conv2d(embed_dim, latent_channels, 1))
        self.decoder = decoder


class DiffusersKL(FirstStage):
    """``AutoencoderKL``: :meth:`encode` gives the posterior's mean, so it is deterministic.

    Arguments as :class:`DiffusersVQ`'s; ``quant_conv`` and ``post_quant_conv`` are missing in newer ones.
    Latents are (z - latents_mean) / latents_std, one number for each of their channels.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        quant_conv: bool = True,
        post_quant_conv: bool = True,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        **shape: Any,
    ) -> None:
        super().__init__()
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise ValueError(f"{name} has {len(values)} numbers for {latent_channels} channels")
        self.latents_mean, self.latents_std, z = latents_mean, latents_std, latent_channels
        self.encoder, self.decoder = _coders(2 * z, z, **shape)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = by_name_only(nn.Conv2d(z, z, 1)) if post_quant_conv else nn.Identity()

    def encode(self, images: Tensor) -> Tensor:
        mean, _ = super().encode(images).chunk(2, dim=1)
        if self.latents_mean is not None:
            mean = mean - _per_channel(self.latents_mean, mean)
        return mean if self.latents_std is None else mean / _per_channel(self.latents_std, mean)

    def decode(self, z: Tensor) -> Tensor:
        if self.latents_std is not None:
            z = z * _per_channel(self.latents_std, z)
        if self.latents_mean is not None:
            z = z + _per_channel(self.latents_mean, z)
        return super().decode(z)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
