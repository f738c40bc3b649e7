"""The U-Nets of score-based models (Song et al. 2020, arXiv 2011.13456) with the numbering of
yang-song/score_sde_pytorch: ``ddpm`` and ``ncsnpp`` (DDPM++, NCSN++) on positional embeddings.

Layers sit in one list, ``all_modules.N``; the original's NIN layers are 1x1 convolutions here, whose weights
are the transpose of its ``W`` (:mod:`bidm_cli.checkpoints.families.score_sde` turns them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import (
    Features,
    Prologue,
    fused_conv,
    joined,
    read_in_place,
    resampling_conv,
    shortcut,
    upsampled,
)
from bidm_cli.networks.layers import (
    AsymmetricConv2d,
    AttentionProduct,
    Block,
    DenoisingNetwork,
    NetworkInputs,
    SkipJoin,
    attend_positions,
    sinusoidal_embedding,
    with_role,
)

Kind = Literal["ddpm", "biggan"]


def group_norm(channels: int, groups: int | None) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6; ``groups`` None: a quarter of the channels, at most 32 (NCSN++)."""
    return nn.GroupNorm(groups or min(channels // 4, 32), channels, eps=1e-6)


def nin(channels: int, out_channels: int, role: str) -> nn.Module:
    """The original's "network in network": a 1x1 convolution."""
    return with_role(nn.Conv2d(channels, out_channels, 1), role)


def _filter(x: Tensor, gain: float) -> Tensor:
    """The binomial filter [1, 3, 3, 1] in both directions for each channel of x, [C, 1, 4, 4]."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    return (gain * torch.outer(taps, taps)).expand(x.shape[1], 1, 4, 4)


def filtered_half(x: Tensor) -> Tensor:
    """x [N, C, H, W] low-pass filtered and taken at every second position."""
    return F.conv2d(x, _filter(x, 1.0), stride=2, padding=1, groups=x.shape[1])


def filtered_double(x: Tensor) -> Tensor:
    """x [N, C, H, W] with zeros in between, low-pass filtered, [N, C, 2H, 2W]."""
    return F.conv_transpose2d(x, _filter(x, 4.0), stride=2, padding=1, groups=x.shape[1])


class ResnetBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv, + shortcut: [N, C, H, W] -> [N, O, H', W'].

    Args:
        kind: "biggan" blocks can resample ("up", "down", before the first conv); "ddpm" ones cannot.
        fir: resample with the binomial filter, else nearest neighbour and 2x2 averages.
        rescale: divide the sum with the shortcut by sqrt 2.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        *,
        kind: Kind,
        groups: int | None,
        resample: Literal["up", "down"] | None = None,
        fir: bool = False,
        rescale: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resample, self.fir, self.scale = resample, fir, 2**-0.5 if rescale else 1.0
        self.GroupNorm_0 = group_norm(channels, groups)
        self.Conv_0 = with_role(nn.Conv2d(channels, out_channels, 3, padding=1), "conv")
        self.Dense_0 = with_role(nn.Linear(embedding, out_channels), "time_projection")
        self.GroupNorm_1 = group_norm(out_channels, groups)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = with_role(nn.Conv2d(out_channels, out_channels, 3, padding=1), "conv")
        self.shortcut_name = None
        if channels != out_channels or resample is not None:
            self.shortcut_name = "NIN_0" if kind == "ddpm" else "Conv_2"
            self.add_module(self.shortcut_name, nin(channels, out_channels, "skip"))

    def forward(self, x: Features, embedding: Tensor) -> Tensor:
        offset, before = self.Dense_0(F.silu(embedding)), Prologue(self.GroupNorm_0, silu=True)
        if self.resample is not None and self.fir:
            filtered = filtered_half if self.resample == "down" else filtered_double
            x, upsample = joined(x), 1
            h = fused_conv(self.Conv_0, filtered(before(x)), offset=offset)
            x = filtered(x)
        else:
            x = read_in_place(self.Conv_0, x)
            h, x, upsample = resampling_conv(self.Conv_0, x, before, self.resample, offset)
        skip = shortcut(getattr(self, self.shortcut_name) if self.shortcut_name else None, x, upsample)
        between = Prologue(self.GroupNorm_1, silu=True, dropout=self.Dropout_0)
        h = fused_conv(self.Conv_1, h, prologue=between, residual=skip)
        return h if self.scale == 1.0 else h * self.scale


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions, with a residual: [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, channels: int, groups: int | None, rescale: bool) -> None:
        super().__init__()
        self.scale = 2**-0.5 if rescale else 1.0
        self.GroupNorm_0 = group_norm(channels, groups)
        self.NIN_0 = nin(channels, channels, "attention_qkv")
        self.NIN_1 = nin(channels, channels, "attention_qkv")
        self.NIN_2 = nin(channels, channels, "attention_qkv")
        self.NIN_3 = nin(channels, channels, "attention_out")
        self.product = AttentionProduct()

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        attended = attend_positions(h, self.NIN_0, self.NIN_1, self.NIN_2, self.product)
        h = fused_conv(self.NIN_3, attended, residual=x)
        return h if self.scale == 1.0 else h * self.scale


class Downsample(nn.Module):
    """Halve H and W: a 3x3 stride-2 conv after zeros right and bottom or after the filter, or an average."""

    def __init__(self, channels: int, out_channels: int, *, fir: bool, with_conv: bool, role: str) -> None:
        super().__init__()
        self.with_conv, self.fir = with_conv, fir
        if with_conv and fir:
            self.Conv2d_0 = with_role(nn.Conv2d(channels, out_channels, 3, stride=2), role)
        elif with_conv:
            self.Conv_0 = with_role(AsymmetricConv2d(channels, out_channels, 3, 2, (0, 1, 0, 1)), role)

    def forward(self, x: Tensor) -> Tensor:
        if not self.with_conv:
            return F.avg_pool2d(x, 2)
        if not self.fir:
            return self.Conv_0(x)
        filtered = F.conv2d(x, _filter(x, 1.0), padding=2, groups=x.shape[1])
        return self.Conv2d_0(filtered)


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then a 3x3 conv unless ``with_conv`` is false."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.Conv_0 = with_role(nn.Conv2d(channels, channels, 3, padding=1), "resample")

    def forward(self, x: Tensor) -> Tensor:
        return fused_conv(self.Conv_0, x, upsample=2) if self.with_conv else upsampled(x, 2)


class ScoreUNet(DenoisingNetwork):
    """The whole network; one entry of ``ch_mult`` a resolution, finest first.

    Args:
        attention_levels: resolutions with attention after each block of the encoder, and after the last one
            of the decoder.
        kind: of the residual blocks; "biggan" ones resample themselves, "ddpm" ones leave it to convolutions.
        norm_groups: of every group norm; None for NCSN++'s rule.
        skip_rescale, fir: see :class:`ResnetBlock`.
        input_pyramid: the image, made smaller by convolutions, is added at each resolution of the encoder
            (progressive_input "residual").
    """

    def __init__(
        self,
        *,
        in_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        kind: Kind,
        norm_groups: int | None = None,
        skip_rescale: bool = False,
        fir: bool = False,
        input_pyramid: bool = False,
        resamp_with_conv: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(in_channels)
        self.ch, self.widths, self.num_res_blocks = ch, [ch * mult for mult in ch_mult], num_res_blocks
        self.attention_levels, self.kind, self.groups = set(attention_levels), kind, norm_groups
        self.rescale, self.fir, self.dropout = skip_rescale, fir, dropout
        self.scale = 2**-0.5 if skip_rescale else 1.0
        self.input_pyramid, self.with_conv = input_pyramid, resamp_with_conv
        self.all_modules = nn.ModuleList()
        self.points: list[Block] = []
        for width in (ch, 4 * ch):
            self.all_modules.append(with_role(nn.Linear(width, 4 * ch), "time_embedding"))
        skips = self._build_encoder(in_channels)
        self._add(self._block(self.widths[-1], self.widths[-1]))
        self._add(self._attention(self.widths[-1]))
        self._add(self._block(self.widths[-1], self.widths[-1]), "middle")
        self._build_decoder(skips)
        self._add(group_norm(self.widths[0], norm_groups))
        self._add(with_role(nn.Conv2d(self.widths[0], in_channels, 3, padding=1), "head"))
        self.join = SkipJoin()

    def _add(self, module: nn.Module, stage: Literal["encoder", "middle", "decoder"] | None = None) -> None:
        """Append to the list; with ``stage`` its output is a feature point."""
        if stage is not None:
            self.points.append(Block(f"all_modules.{len(self.all_modules)}", stage))
        self.all_modules.append(module)

    def _block(
        self, channels: int, out_channels: int, resample: Literal["up", "down"] | None = None
    ) -> nn.Module:
        return ResnetBlock(
            channels,
            out_channels,
            4 * self.ch,
            kind=self.kind,
            groups=self.groups,
            resample=resample,
            fir=self.fir,
            rescale=self.rescale,
            dropout=self.dropout,
        )

    def _attention(self, channels: int) -> nn.Module:
        return AttnBlock(channels, self.groups, self.rescale)

    def _build_encoder(self, in_channels: int) -> list[int]:
        """Append the encoder; return the width of each of its outputs."""
        self._add(with_role(nn.Conv2d(in_channels, self.ch, 3, padding=1), "stem"), "encoder")
        skips, width, pyramid = [self.ch], self.ch, in_channels
        for level, out in enumerate(self.widths):
            attends = level in self.attention_levels
            for _ in range(self.num_res_blocks):
                self._add(self._block(width, out), None if attends else "encoder")
                if attends:
                    self._add(self._attention(out), "encoder")
                width = out
                skips.append(width)
            if level == len(self.widths) - 1:
                break
            if self.kind == "biggan":
                self._add(self._block(width, width, "down"), "encoder")
            else:
                resampler = Downsample(width, width, fir=False, with_conv=self.with_conv, role="resample")
                self._add(resampler, "encoder")
            if self.input_pyramid:
                role = "stem" if pyramid == in_channels else "resample"
                self._add(Downsample(pyramid, width, fir=self.fir, with_conv=True, role=role))
                pyramid = width
            skips.append(width)
        return skips

    def _build_decoder(self, skips: list[int]) -> None:
        """Append the decoder."""
        width = self.widths[-1]
        for level in reversed(range(len(self.widths))):
            for _ in range(self.num_res_blocks + 1):
                self._add(self._block(width + skips.pop(), self.widths[level]), "decoder")
                width = self.widths[level]
            if level in self.attention_levels:
                self._add(self._attention(width))
            if level:
                up = self._block(width, width, "up") if self.kind == "biggan" else None
                self._add(up or Upsample(width, self.with_conv))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        layers = iter(self.all_modules)
        embedding = sinusoidal_embedding(t, self.ch, order="sin_cos", divisor_offset=1).to(x.dtype)
        embedding = next(layers)(embedding)
        embedding = next(layers)(F.silu(embedding))
        skips = self._encode(x, embedding, layers)
        h = next(layers)(skips[-1], embedding)
        h = next(layers)(h)
        h = next(layers)(h, embedding)
        for level in reversed(range(len(self.widths))):
            for _ in range(self.num_res_blocks + 1):
                h = next(layers)(self.join(h, skips.pop()), embedding)
            if level in self.attention_levels:
                h = next(layers)(h)
            if level:
                h = self._resampled(next(layers), h, embedding)
        h = F.silu(next(layers)(h))
        return next(layers)(h)

    def _encode(self, x: Tensor, embedding: Tensor, layers: Iterator[nn.Module]) -> list[Tensor]:
        """The encoder's outputs, which the decoder takes from the last to the first."""
        pyramid, h = x, next(layers)(x)
        skips = [h]
        for level in range(len(self.widths)):
            for _ in range(self.num_res_blocks):
                h = next(layers)(h, embedding)
                if level in self.attention_levels:
                    h = next(layers)(h)
                skips.append(h)
            if level == len(self.widths) - 1:
                break
            h = self._resampled(next(layers), h, embedding)
            if self.input_pyramid:
                pyramid = h = (next(layers)(pyramid) + h) * self.scale
            skips.append(h)
        return skips

    def _resampled(self, layer: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        return layer(h, embedding) if self.kind == "biggan" else layer(h)

    def blocks(self) -> list[Block]:
        return list(self.points)
