"""The U-Nets of score-based models (Song et al. 2020, arXiv 2011.13456) with the numbering of
yang-song/score_sde_pytorch: ``ddpm`` and ``ncsnpp`` (DDPM++, NCSN++) on positional embeddings.

Layers sit in one list, ``all_modules.N``; the original's NIN layers are 1x1 convolutions here, whose weights
are the transpose of its ``W`` (:mod:`bidm_cli.checkpoints.families.score_sde` turns them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Features, Prologue, fused_conv, joined
from bidm_cli.networks.layers import (
    Block,
    DenoisingNetwork,
    NetworkInputs,
    SkipJoin,
    conv3x3,
    sinusoidal_embedding,
    with_role,
)
from bidm_cli.networks.unet_blocks import (
    AttnBlock,
    Downsample,
    Resample,
    ResidualBlock,
    Upsample,
    level_inputs,
    residual_layers,
    skip_conv,
)

Kind = Literal["ddpm", "biggan"]


def group_norm(channels: int, groups: int | None) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6; ``groups`` None: a quarter of the channels, at most 32 (NCSN++)."""
    return nn.GroupNorm(groups or min(channels // 4, 32), channels, eps=1e-6)


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


class ResnetBlock(ResidualBlock):
    """Residual block with the time embedding.

    Args:
        kind: "biggan" blocks can resample; "ddpm" ones cannot.
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
        resample: Resample | None = None,
        fir: bool = False,
        rescale: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resample, self.fir, self.scale = resample, fir, 2**-0.5 if rescale else 1.0
        norm = partial(group_norm, groups=groups)
        layers = residual_layers(norm, channels, out_channels, embedding, dropout=dropout)
        self.GroupNorm_0, self.Conv_0, self.Dense_0, self.GroupNorm_1, self.Dropout_0, self.Conv_1 = layers
        self.shortcut_name = "NIN_0" if kind == "ddpm" else "Conv_2"
        self.add_module(self.shortcut_name, skip_conv(channels, out_channels, always=resample is not None))

    def layers(self) -> Sequence[nn.Module]:
        first = self.GroupNorm_0, self.Conv_0, self.Dense_0
        return *first, self.GroupNorm_1, self.Dropout_0, self.Conv_1, getattr(self, self.shortcut_name)

    def first(
        self, conv: nn.Module, x: Features, prologue: Prologue, offset: Tensor | None
    ) -> tuple[Tensor, Features, int]:
        if self.resample is None or not self.fir:
            return super().first(conv, x, prologue, offset)
        filtered = filtered_half if self.resample == "down" else filtered_double
        x = joined(x)
        return fused_conv(conv, filtered(prologue(x)), offset=offset), filtered(x), 1

    def forward(self, x: Features, embedding: Tensor | None = None) -> Tensor:
        h = super().forward(x, embedding)
        return h if self.scale == 1.0 else h * self.scale


class FilteredDownsample(nn.Module):
    """Halve H and W by a 3x3 stride-2 conv after the binomial filter."""

    def __init__(self, channels: int, out_channels: int, role: str) -> None:
        super().__init__()
        self.Conv2d_0 = with_role(nn.Conv2d(channels, out_channels, 3, stride=2), role)

    def forward(self, x: Tensor) -> Tensor:
        return self.Conv2d_0(F.conv2d(x, _filter(x, 1.0), padding=2, groups=x.shape[1]))


class ScoreUNet(DenoisingNetwork):
    """The whole network; one entry of ``ch_mult`` per resolution, finest first.

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
        self.fir, self.scale = fir, 2**-0.5 if skip_rescale else 1.0
        shared = {"kind": kind, "groups": norm_groups, "fir": fir, "rescale": skip_rescale}
        self.shared: dict[str, Any] = {"embedding": 4 * ch, "dropout": dropout, **shared}
        self.input_pyramid, self.with_conv = input_pyramid, resamp_with_conv
        self.all_modules = nn.ModuleList()
        self.points: list[Block] = []
        for width in (ch, 4 * ch):
            self._add(with_role(nn.Linear(width, 4 * ch), "time_embedding"))
        downs, ups = level_inputs(ch, self.widths, [num_res_blocks] * len(self.widths))
        self._build_encoder(in_channels, downs)
        self._add(self._block(self.widths[-1], self.widths[-1]))
        self._add(self._attention(self.widths[-1]))
        self._add(self._block(self.widths[-1], self.widths[-1]), "middle")
        self._build_decoder(ups)
        self._add(group_norm(self.widths[0], norm_groups))
        self._add(conv3x3(self.widths[0], in_channels, "head"))
        self.join = SkipJoin()

    def _add(self, module: nn.Module, stage: Literal["encoder", "middle", "decoder"] | None = None) -> None:
        """Append to the list; with ``stage`` its output is a feature point."""
        if stage is not None:
            self.points.append(Block(f"all_modules.{len(self.all_modules)}", stage))
        self.all_modules.append(module)

    def _block(self, channels: int, out_channels: int, resample: Resample | None = None) -> nn.Module:
        return ResnetBlock(channels, out_channels, resample=resample, **self.shared)

    def _attention(self, channels: int) -> nn.Module:
        names = ("GroupNorm_0", "NIN_0", "NIN_1", "NIN_2", "NIN_3")
        return AttnBlock(group_norm(channels, self.groups), names, self.scale)

    def _build_encoder(self, in_channels: int, inputs: list[list[int]]) -> None:
        self._add(conv3x3(in_channels, self.ch, "stem"), "encoder")
        pyramid = in_channels
        for level, width in enumerate(self.widths):
            attends = level in self.attention_levels
            for channels in inputs[level]:
                self._add(self._block(channels, width), None if attends else "encoder")
                if attends:
                    self._add(self._attention(width), "encoder")
            if level == len(self.widths) - 1:
                break
            if self.kind == "biggan":
                self._add(self._block(width, width, resample="down"), "encoder")
            else:
                self._add(Downsample(width, self.with_conv, padding=0, name="Conv_0"), "encoder")
            if self.input_pyramid:
                role = "stem" if level == 0 else "resample"
                conv: nn.Module | None = FilteredDownsample(pyramid, width, role) if self.fir else None
                if conv is None:
                    conv = Downsample(pyramid, padding=0, out_channels=width, name="Conv_0", role=role)
                self._add(conv)
                pyramid = width

    def _build_decoder(self, inputs: list[list[int]]) -> None:
        for level, width in reversed(list(enumerate(self.widths))):
            for channels in inputs[level]:
                self._add(self._block(channels, width), "decoder")
            if level in self.attention_levels:
                self._add(self._attention(width))
            if level:
                up = self._block(width, width, resample="up") if self.kind == "biggan" else None
                self._add(up or Upsample(width, self.with_conv, name="Conv_0"))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        layers = iter(self.all_modules)
        embedding = sinusoidal_embedding(t, self.ch, order="sin_cos", divisor_offset=1).to(x.dtype)
        embedding = next(layers)(embedding)
        embedding = next(layers)(F.silu(embedding))
        skips = self._encode(x, embedding, layers)
        h = skips[-1]
        for _ in range(3):  # block, attention, block
            h = next(layers)(h, embedding)
        for level in reversed(range(len(self.widths))):
            for _ in range(self.num_res_blocks + 1):
                h = next(layers)(self.join(h, skips.pop()), embedding)
            for _ in range((level in self.attention_levels) + (level > 0)):  # attention, upsampler
                h = next(layers)(h, embedding)
        prologue = Prologue(next(layers), silu=True)
        return fused_conv(next(layers), h, prologue=prologue)

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
            h = next(layers)(h, embedding)
            if self.input_pyramid:
                pyramid = h = (next(layers)(pyramid) + h) * self.scale
            skips.append(h)
        return skips

    def blocks(self) -> list[Block]:
        return list(self.points)
