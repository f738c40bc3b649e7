"""First stages of latent diffusion, with CompVis ``autoencoder`` keys: images [N, 3, H, W] in [-1, 1] to
latents [N, C, H/f, W/f] and back.

:class:`VQFirstStage` rounds latents to a codebook when decoding (VQ-GAN, arXiv 2012.09841);
:class:`KLFirstStage` is a variational autoencoder. Latents here are not yet scaled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.ddpm_unet import Middle, ddpm_level, group_norm
from bidm_cli.networks.fusion import Prologue, fused_conv
from bidm_cli.networks.layers import by_name_only, conv3x3
from bidm_cli.networks.unet_blocks import Downsample, Level, Upsample


class Coder(nn.Module):
    """Encoder, [N, C, H, W] -> [N, O, H/f, W/f] with f = 2^(len(widths) - 1), or decoder, the other way.

    A subclass makes the blocks and names them: ``names`` of the encoder's levels, the decoder's, the middle
    and the last norm. With ``finest_first`` a decoder keeps its levels so, not in the order of execution.
    """

    names = ("down", "up", "mid", "norm_out")
    finest_first = True

    def build(
        self, channels: tuple[int, int], stem: int, widths: Sequence[int], depth: int, decodes: bool
    ) -> None:
        """Set all layers.

        Args:
            channels: that go in and come out. stem: width of the first conv.
            widths: of the levels, finest first. depth: blocks of each.
        """
        self.decodes, width = decodes, stem
        self.conv_in = conv3x3(channels[0], stem, "stem")
        levels: list[Level] = []
        for i in self._order(range(len(widths))):
            resamples = i > 0 if decodes else i < len(widths) - 1
            inputs = [width, *[widths[i]] * (depth - 1)]
            levels.append(self.level(inputs, widths[i], i, resamples))
            width = widths[i]
        kept = nn.ModuleList(self._order(levels) if self.finest_first else levels)
        sections = [(self.names[decodes], kept), (self.names[2], self.middle(widths[-1]))]
        for name, module in self._order(sections):
            self.add_module(name, module)
        self.add_module(self.names[3], self.norm(width))
        self.conv_out = conv3x3(width, channels[1], "head")

    def level(self, inputs: Sequence[int], width: int, index: int, resamples: bool) -> Level:
        """One resolution; ``inputs``: channels into each block."""
        raise NotImplementedError

    def middle(self, width: int) -> nn.Module:
        raise NotImplementedError

    def norm(self, channels: int) -> nn.Module:
        raise NotImplementedError

    def _order(self, steps: Iterable[Any]) -> list[Any]:
        """An encoder's levels or sections in the order of execution, which a decoder's reverse."""
        return list(steps)[:: -1 if self.decodes else 1]

    def forward(self, x: Tensor) -> Tensor:
        levels = getattr(self, self.names[self.decodes])
        if self.finest_first:
            levels = self._order(levels)
        h, middle = self.conv_in(x), getattr(self, self.names[2])
        for step in [middle, *levels] if self.decodes else [*levels, middle]:
            h = step(h)
        return fused_conv(self.conv_out, h, prologue=Prologue(getattr(self, self.names[3]), silu=True))


class CompVisCoder(Coder):
    """Encoder or decoder with CompVis' names."""

    def __init__(
        self,
        channels: tuple[int, int],
        ch: int,
        ch_mult: Sequence[int],
        depth: int,
        attention_levels: Sequence[int],
        mid_attention: bool,
        resamp_with_conv: bool,
        decodes: bool,
    ) -> None:
        super().__init__()
        self.attention_levels, self.mid_attention = attention_levels, mid_attention
        self.with_conv = resamp_with_conv
        widths = [ch * mult for mult in ch_mult]
        self.build(channels, widths[-1] if decodes else ch, widths, depth + decodes, decodes)

    def level(self, inputs: Sequence[int], width: int, index: int, resamples: bool) -> Level:
        way: tuple[str, nn.Module] = "downsample", Downsample(width, self.with_conv, padding=0)
        if self.decodes:
            way = "upsample", Upsample(width, self.with_conv)
        return ddpm_level(inputs, width, index in self.attention_levels, way if resamples else None)

    def middle(self, width: int) -> nn.Module:
        return Middle(width, attention=self.mid_attention)

    def norm(self, channels: int) -> nn.Module:
        return group_norm(channels)


class Codebook(nn.Module):
    """``n_embed`` vectors; each position of z [N, C, H, W] becomes its nearest one in L2 distance."""

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        chosen = self.embedding(self.nearest(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])))
        chosen = chosen.reshape(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        # The originals pass gradients around the rounding so; what that costs in precision shows in decoded
        # images where z is far larger than the codes.
        return z + (chosen - z)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """Numbers [M] of the codes nearest to rows [M, C]."""
        # In pieces, so that the table of distances stays in a cache.
        table = rows.new_empty(min(256, len(rows)), len(self.embedding.weight))
        pieces = (self.distances(piece, table[: len(piece)]) for piece in rows.split(256))
        return torch.cat([_smallest(distances) for distances in pieces])

    def distances(self, rows: Tensor, out: Tensor) -> Tensor:
        """Distances of rows [M, C] to all codes but for a constant per row, [M, n_embed].

        ``out``: a tensor of this shape that may be written to.
        """
        codes = self.embedding.weight
        # |z - e|^2 without |z|^2, which is the same for every e.
        return torch.addmm(codes.square().sum(dim=1), rows, codes.T, alpha=-2, out=out)


def _smallest(values: Tensor) -> Tensor:
    """Columns [M] of the smallest of values [M, n] in each row."""
    # argmin over everything takes as long as all else in a codebook; amin uses vector instructions.
    lines = values.unflatten(1, (math.gcd(values.shape[1], 32), -1))
    column = lines.amin(dim=1).argmin(dim=1)
    line = lines.gather(2, column[:, None, None].expand(-1, lines.shape[1], 1)).argmin(dim=1).squeeze(1)
    return line * lines.shape[2] + column


class FirstStage(nn.Module):
    """Encoder and decoder, each with a 1x1 conv to or from the latents, and a codebook where there is one.

    Packed files may leave the encoder out (:meth:`drop_encoder`).
    """

    encoder: nn.Module | None
    decoder: nn.Module
    quant_conv: nn.Module | None
    post_quant_conv: nn.Module
    tanh_out = False

    def __init__(self) -> None:
        super().__init__()
        self.quantize: nn.Module | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to latents [N, embed_dim, H/f, W/f].

        Raises:
            BidmError: the encoder was left out.
        """
        if self.encoder is None or self.quant_conv is None:
            raise BidmError(
                "this model's first stage has no encoder, its packed file holds the decoder alone; encode "
                "with the original, or compress it again with keep: both under first_stage in the recipe"
            )
        return self.quant_conv(self.encoder(images))

    def drop_encoder(self) -> None:
        """Leave out the encoder and its 1x1 conv, which decoding does not need."""
        self.encoder = self.quant_conv = None

    def without_encoder(self) -> FirstStage:
        """A first stage that shares all of this one but its encoder."""
        decoder = copy.copy(self)
        decoder._modules = dict(self._modules)
        decoder.drop_encoder()
        return decoder

    def take_encoder(self, other: FirstStage) -> None:
        """Share the encoder of another first stage, with its 1x1 conv."""
        self.encoder, self.quant_conv = other.encoder, other.quant_conv

    def decode(self, z: Tensor) -> Tensor:
        """Latents [N, embed_dim, h, w], rounded to the codebook, to images [N, 3, f h, f w]."""
        z = z if self.quantize is None else self.quantize(z)
        images = self.decoder(self.post_quant_conv(z))
        return images.tanh() if self.tanh_out else images

    def forward(self, z: Tensor) -> Tensor:
        """:meth:`decode`."""
        return self.decode(z)


class CompVisStage(FirstStage):
    """First stage with CompVis' names.

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
        self.encoder = CompVisCoder((in_channels, encoded), *shape, decodes=False)
        self.decoder = CompVisCoder((z_channels, out_channels), *shape, decodes=True)
        self.tanh_out = tanh_out
        self.quant_conv = nn.Conv2d(encoded, 2 * embed_dim if double_z else embed_dim, 1)
        self.post_quant_conv = by_name_only(nn.Conv2d(embed_dim, z_channels, 1))


class VQFirstStage(CompVisStage):
    """First stage with a codebook: latents are continuous, decoding rounds them to the nearest code."""

    def __init__(self, *, n_embed: int, embed_dim: int, double_z: bool = False, **shape: object) -> None:
        super().__init__(embed_dim=embed_dim, double_z=double_z, **shape)  # type: ignore[arg-type]
        self.quantize = Codebook(n_embed, embed_dim)


class KLFirstStage(CompVisStage):
    """Variational first stage: :meth:`encode` gives the posterior's mean, so it is deterministic."""

    def __init__(self, *, double_z: bool = True, **shape: object) -> None:
        super().__init__(double_z=double_z, **shape)  # type: ignore[arg-type]

    def encode(self, images: Tensor) -> Tensor:
        mean, _ = super().encode(images).chunk(2, dim=1)
        return mean
