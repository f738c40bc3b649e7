"""First stages of latent diffusion, with CompVis ``autoencoder`` keys: images [N, 3, H, W] in [-1, 1] to
latents [N, C, H/f, W/f] and back.

    z = first_stage.encode(images)
    images = first_stage.decode(z)

:class:`VQFirstStage` rounds latents to a codebook when decoding (VQ-GAN, arXiv 2012.09841);
:class:`KLFirstStage` is a variational autoencoder. Latents here are not yet scaled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.ddpm_unet import AttnBlock, Downsample, ResnetBlock, group_norm
from bidm_cli.networks.layers import Upsample, with_role


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it, then the resampler.

    ``resample`` is the name and module that lead to the next level; None at the last.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        resample: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.block.append(ResnetBlock(channels, out_channels, None))
            if attention:
                self.attn.append(AttnBlock(out_channels))
            channels = out_channels
        self.resample_name = None
        if resample is not None:
            self.resample_name = resample[0]
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self.resample_name is None else self.get_submodule(self.resample_name)(x)


class Middle(nn.Module):
    """Block, attention (optional), block at the coarsest resolution."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, None)
        self.attn_1: nn.Module = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H/f, W/f], f = 2^(len(ch_mult) - 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        resamp_with_conv: bool,
    ) -> None:
        super().__init__()
        self.conv_in = with_role(nn.Conv2d(in_channels, ch, 3, padding=1), "stem")
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            out = ch * mult
            last = i == len(ch_mult) - 1
            down = None if last else ("downsample", Downsample(out, resamp_with_conv))
            self.down.append(Level(width, out, num_res_blocks, i in attention_levels, down))
            width = out
        self.mid = Middle(width, mid_attention)
        self.norm_out = group_norm(width)
        self.conv_out = with_role(nn.Conv2d(width, out_channels, 3, padding=1), "head")

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """[N, in_channels, h, w] -> [N, out_channels, f h, f w]; ``ch_mult`` is finest first, as above."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        resamp_with_conv: bool,
        tanh_out: bool,
    ) -> None:
        super().__init__()
        self.tanh_out = tanh_out
        width = ch * ch_mult[-1]
        self.conv_in = with_role(nn.Conv2d(in_channels, width, 3, padding=1), "stem")
        self.mid = Middle(width, mid_attention)
        levels: list[nn.Module] = []
        for i in reversed(range(len(ch_mult))):
            out = ch * ch_mult[i]
            up = None if i == 0 else ("upsample", Upsample(out, resamp_with_conv))
            levels.insert(0, Level(width, out, num_res_blocks + 1, i in attention_levels, up))
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(width)
        self.conv_out = with_role(nn.Conv2d(width, out_channels, 3, padding=1), "head")

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return h.tanh() if self.tanh_out else h


class FirstStage(nn.Module):
    """Encoder and decoder with a 1x1 conv to and from the latent space.

    Args:
        in_channels, out_channels: of the images read and written.
        ch: width of the finest level; times ``ch_mult`` at each, finest first.
        attention_levels: indices into ``ch_mult`` of the levels with attention after each block.
        z_channels: width between encoder or decoder and those 1x1 convs.
        embed_dim: channels of the latents.
        double_z: the encoder gives mean and log-variance, twice ``z_channels``.
        mid_attention: attention in the middle.
        tanh_out: the decoder ends in a tanh.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        z_channels: int,
        embed_dim: int,
        double_z: bool,
        mid_attention: bool = True,
        resamp_with_conv: bool = True,
        tanh_out: bool = False,
    ) -> None:
        super().__init__()
        encoded = 2 * z_channels if double_z else z_channels
        shape = (ch, ch_mult, num_res_blocks, attention_levels, mid_attention, resamp_with_conv)
        self.encoder = Encoder(in_channels, encoded, *shape)
        self.decoder = Decoder(z_channels, out_channels, *shape, tanh_out)
        self.quant_conv = nn.Conv2d(encoded, 2 * embed_dim if double_z else embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to latents [N, embed_dim, H/f, W/f]."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [N, embed_dim, h, w] to images [N, 3, f h, f w]."""
        return self.decoder(self.post_quant_conv(z))


class Codebook(nn.Module):
    """``n_embed`` vectors; each position of z [N, C, H, W] becomes its nearest one in L2 distance."""

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        # In pieces, so that the table of distances stays small.
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).split(4096)
        nearest = [self.distances(piece).argmin(dim=1) for piece in rows]
        chosen = self.embedding(torch.cat(nearest))
        chosen = chosen.reshape(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        # The originals pass gradients around the rounding so; what that costs in precision shows in decoded
        # images where z is far larger than the codes.
        return z + (chosen - z)

    def distances(self, rows: Tensor) -> Tensor:
        """What to compare of rows [M, C] and all codes, [M, n_embed]."""
        codes = self.embedding.weight
        # |z - e|^2 without |z|^2, which is the same for every e.
        return torch.addmm(codes.square().sum(dim=1), rows, codes.T, alpha=-2)


class VQFirstStage(FirstStage):
    """First stage with a codebook: latents are continuous, decoding rounds them to the nearest code."""

    def __init__(self, *, n_embed: int, embed_dim: int, double_z: bool = False, **shape: object) -> None:
        super().__init__(embed_dim=embed_dim, double_z=double_z, **shape)  # type: ignore[arg-type]
        self.quantize = Codebook(n_embed, embed_dim)

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantize(z))


class KLFirstStage(FirstStage):
    """Variational first stage: :meth:`encode` gives the posterior's mean, so it is deterministic."""

    def __init__(self, *, double_z: bool = True, **shape: object) -> None:
        super().__init__(double_z=double_z, **shape)  # type: ignore[arg-type]

    def encode(self, images: Tensor) -> Tensor:
        mean, _ = super().encode(images).chunk(2, dim=1)
        return mean
