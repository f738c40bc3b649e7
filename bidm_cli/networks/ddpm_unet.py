"""The DDPM U-Net (Ho et al. 2020, arXiv 2006.11239) with the keys of its PyTorch ports.

pesser/pytorch_diffusion, ermongroup/ddim and LDM's ``Model`` class share these names, so their weights load
with ``load_state_dict(strict=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Features, Prologue, fused_conv, read_in_place, shortcut
from bidm_cli.networks.layers import (
    AsymmetricConv2d,
    AttentionProduct,
    Block,
    DenoisingNetwork,
    NetworkInputs,
    SkipJoin,
    Upsample,
    attend_positions,
    sinusoidal_embedding,
    with_role,
)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm as the DDPM family has it: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv, + shortcut: [N,C,H,W] -> [N,O,H,W]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int | None,
        dropout: float = 0.0,
        conv_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = with_role(nn.Conv2d(in_channels, out_channels, 3, padding=1), "conv")
        if embedding is not None:
            self.temb_proj = with_role(nn.Linear(embedding, out_channels), "time_projection")
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = with_role(nn.Conv2d(out_channels, out_channels, 3, padding=1), "conv")
        self.shortcut_name = None
        if in_channels != out_channels:
            self.shortcut_name = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            kernel = 3 if conv_shortcut else 1
            layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
            self.add_module(self.shortcut_name, with_role(layer, "skip"))

    def forward(self, x: Features, embedding: Tensor | None = None) -> Tensor:
        x = read_in_place(self.conv1, x)
        offset = None if embedding is None else self.temb_proj(F.silu(embedding))
        h = fused_conv(self.conv1, x, prologue=Prologue(self.norm1, silu=True), offset=offset)
        skip = shortcut(getattr(self, self.shortcut_name) if self.shortcut_name else None, x)
        between = Prologue(self.norm2, silu=True, dropout=self.dropout)
        return fused_conv(self.conv2, h, prologue=between, residual=skip)


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions, with a residual: [N,C,H,W] -> [N,C,H,W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = with_role(nn.Conv2d(channels, channels, 1), "attention_qkv")
        self.k = with_role(nn.Conv2d(channels, channels, 1), "attention_qkv")
        self.v = with_role(nn.Conv2d(channels, channels, 1), "attention_qkv")
        self.proj_out = with_role(nn.Conv2d(channels, channels, 1), "attention_out")
        self.product = AttentionProduct()

    def forward(self, x: Tensor) -> Tensor:
        attended = attend_positions(self.norm(x), self.q, self.k, self.v, self.product)
        return fused_conv(self.proj_out, attended, residual=x)


class Downsample(nn.Module):
    """Halve H and W: 3x3 stride-2 conv padded right and bottom only, or a 2x2 average."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv: nn.Module | None = None
        if with_conv:
            self.conv = with_role(AsymmetricConv2d(channels, channels, 3, 2, (0, 1, 0, 1)), "resample")

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t, linear, swish, linear: [N] -> [N, 4 ch]."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.ch = ch
        self.dense = nn.ModuleList(
            with_role(nn.Linear(width, 4 * ch), "time_embedding") for width in (ch, 4 * ch)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        embedding = sinusoidal_embedding(t, self.ch, order="sin_cos", divisor_offset=1, ratio_first=True)
        return self.dense[1](F.silu(self.dense[0](embedding.to(dtype))))


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, channels: int, embedding: int, dropout: float, conv_shortcut: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, embedding, dropout, conv_shortcut)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, embedding, dropout, conv_shortcut)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, embedding)), embedding)


class Level(nn.Module):
    """One resolution: blocks, an attention after each where there is any, and a change of size or None."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def run(self, j: int, x: Features, embedding: Tensor) -> Tensor:
        """Block ``j``, and its attention."""
        h = self.block[j](x, embedding)
        return self.attn[j](h) if len(self.attn) else h


class DDPMUNet(DenoisingNetwork):
    """The whole network; one entry of ``ch_mult`` a resolution, finest first.

    Args:
        attention_levels: indices into ``ch_mult`` of the resolutions with attention after each block.
        conv_shortcut: 3x3 instead of 1x1 convs where a block changes the width.
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
        resamp_with_conv: bool = True,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(in_channels)
        self.levels, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.attention_levels = set(attention_levels)
        embedding = 4 * ch
        self.temb = TimeEmbedding(ch)
        self.conv_in = with_role(nn.Conv2d(in_channels, ch, 3, padding=1), "stem")

        widths = [ch * mult for mult in ch_mult]
        skips, width = [ch], ch
        self.down = nn.ModuleList()
        for i, out in enumerate(widths):
            level = Level()
            for _ in range(num_res_blocks):
                level.block.append(ResnetBlock(width, out, embedding, dropout, conv_shortcut))
                if i in attention_levels:
                    level.attn.append(AttnBlock(out))
                width = out
                skips.append(width)
            if i != self.levels - 1:
                level.downsample = Downsample(width, resamp_with_conv)
                skips.append(width)
            self.down.append(level)

        self.mid = Middle(width, embedding, dropout, conv_shortcut)

        up: list[Level] = []
        for i in reversed(range(self.levels)):
            level = Level()
            for _ in range(num_res_blocks + 1):
                level.block.append(
                    ResnetBlock(width + skips.pop(), widths[i], embedding, dropout, conv_shortcut)
                )
                width = widths[i]
                if i in attention_levels:
                    level.attn.append(AttnBlock(width))
            if i != 0:
                level.upsample = Upsample(width, resamp_with_conv)
            up.insert(0, level)
        self.up = nn.ModuleList(up)

        self.join = SkipJoin()
        self.norm_out = group_norm(width)
        self.conv_out = with_role(nn.Conv2d(width, out_channels, 3, padding=1), "head")

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        embedding = self.temb(t, x.dtype)
        h = self.conv_in(x)
        skips = [h]
        for level in cast("list[Level]", self.down):
            for j in range(self.num_res_blocks):
                h = level.run(j, h, embedding)
                skips.append(h)
            if level.downsample is not None:
                h = level.downsample(h)
                skips.append(h)

        h = self.mid(h, embedding)
        for level in reversed(cast("list[Level]", self.up)):
            for j in range(self.num_res_blocks + 1):
                h = level.run(j, self.join(h, skips.pop()), embedding)
            if level.upsample is not None:
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def blocks(self) -> list[Block]:
        found = [Block("conv_in", "encoder")]
        for i in range(self.levels):
            kind = "attn" if i in self.attention_levels else "block"
            found += [Block(f"down.{i}.{kind}.{j}", "encoder") for j in range(self.num_res_blocks)]
            if i != self.levels - 1:
                found.append(Block(f"down.{i}.downsample", "encoder"))
        found.append(Block("mid.block_2", "middle"))
        for i in reversed(range(self.levels)):
            kind = "attn" if i in self.attention_levels else "block"
            found += [Block(f"up.{i}.{kind}.{j}", "decoder") for j in range(self.num_res_blocks + 1)]
            if i != 0:
                found.append(Block(f"up.{i}.upsample", "decoder"))
        return found
