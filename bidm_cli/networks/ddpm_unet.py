"""The DDPM U-Net (Ho et al. 2020, arXiv 2006.11239) with the keys of its PyTorch ports.

pesser/pytorch_diffusion, ermongroup/ddim and LDM's ``Model`` class share these names, so their weights load
with ``load_state_dict(strict=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Prologue, fused_conv
from bidm_cli.networks.layers import NetworkInputs, SkipJoin, conv3x3, embedding_layers, sinusoidal_embedding
from bidm_cli.networks.unet_blocks import (
    AttnBlock,
    Downsample,
    Level,
    LevelUNet,
    ResidualBlock,
    Upsample,
    level_inputs,
    residual_layers,
    skip_conv,
)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm as the DDPM family has it: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(ResidualBlock):
    """Residual block; without ``embedding`` (a width) it takes none. ``conv_shortcut``: of 3x3, not 1x1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int | None,
        dropout: float = 0.0,
        conv_shortcut: bool = False,
    ) -> None:
        super().__init__()
        layers = residual_layers(group_norm, in_channels, out_channels, embedding, dropout=dropout)
        self.norm1, self.conv1, self.temb_proj, self.norm2, self.dropout, self.conv2 = layers
        self.shortcut_name = "conv_shortcut" if conv_shortcut else "nin_shortcut"
        self.add_module(self.shortcut_name, skip_conv(in_channels, out_channels, 3 if conv_shortcut else 1))

    def layers(self) -> Sequence[nn.Module]:
        skip = getattr(self, self.shortcut_name)
        return self.norm1, self.conv1, self.temb_proj, self.norm2, self.dropout, self.conv2, skip


def attn_block(channels: int) -> AttnBlock:
    """Attention under this family's names."""
    return AttnBlock(group_norm(channels), ("norm", "q", "k", "v", "proj_out"))


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t, linear, swish, linear: [N] -> [N, 4 ch]."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.ch = ch
        self.dense = nn.ModuleList(embedding_layers(ch, 4 * ch)[::2])

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        embedding = sinusoidal_embedding(t, self.ch, order="sin_cos", divisor_offset=1, ratio_first=True)
        return self.dense[1](F.silu(self.dense[0](embedding.to(dtype))))


class Middle(nn.Module):
    """Block, attention (optional), block at the coarsest resolution."""

    def __init__(
        self,
        channels: int,
        embedding: int | None = None,
        dropout: float = 0.0,
        conv_shortcut: bool = False,
        attention: bool = True,
    ) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, embedding, dropout, conv_shortcut)
        self.attn_1 = attn_block(channels) if attention else None
        self.block_2 = ResnetBlock(channels, channels, embedding, dropout, conv_shortcut)

    def forward(self, x: Tensor, embedding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        h = self.block_1(x, embedding)
        return self.block_2(h if self.attn_1 is None else self.attn_1(h), embedding)


def ddpm_level(
    inputs: Sequence[int],
    width: int,
    attention: bool,
    resampler: tuple[str, nn.Module] | None,
    embedding: int | None = None,
    dropout: float = 0.0,
    conv_shortcut: bool = False,
) -> Level:
    """One resolution, ``width`` channels wide; ``inputs``: channels into each block."""
    blocks = [ResnetBlock(channels, width, embedding, dropout, conv_shortcut) for channels in inputs]
    attentions = [attn_block(width) for _ in inputs if attention]
    return Level({"block": blocks, "attn": attentions}, ("block", "attn"), resampler)


class DDPMUNet(LevelUNet):
    """The whole network; one entry of ``ch_mult`` per resolution, finest first.

    Args:
        attention_levels: indices into ``ch_mult`` of the resolutions with attention after each block.
        conv_shortcut: 3x3 instead of 1x1 convs where a block changes the width.
    """

    middle_point = "mid.block_2"

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        resamp_with_conv: bool = True,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(in_channels)
        block = (4 * ch, dropout, conv_shortcut)
        self.temb = TimeEmbedding(ch)
        self.conv_in = conv3x3(in_channels, ch, "stem")
        widths, last = [ch * mult for mult in ch_mult], len(ch_mult) - 1
        downs, ups = level_inputs(ch, widths, [num_res_blocks] * len(widths))
        levels: list[tuple[Level, Level]] = []
        for i, width in enumerate(widths):
            attention = i in attention_levels
            down = ("downsample", Downsample(width, resamp_with_conv, padding=0)) if i != last else None
            up = ("upsample", Upsample(width, resamp_with_conv)) if i else None
            encoder = ddpm_level(downs[i], width, attention, down, *block)
            levels.append((encoder, ddpm_level(ups[i], width, attention, up, *block)))
        self.down = nn.ModuleList(down for down, _ in levels)
        self.mid = Middle(widths[-1], *block)
        self.up = nn.ModuleList(up for _, up in levels)
        self.join = SkipJoin()
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], out_channels, "head")

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        h = self.run_levels(self.conv_in(x), self.mid, self.temb(t, x.dtype))
        return fused_conv(self.conv_out, h, prologue=Prologue(self.norm_out, silu=True))
