"""diffusers' ``UNet2DModel`` under its own key names: the DDPM and LDM U-Nets in one class with options.

network = DiffusersUNet(block_out_channels=[128, 256, 256, 256], attention_levels=[1],
                        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6)
noise = network(x, t)     # x [N, 3, 32, 32], t [N]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.diffusers_blocks import (
    Attention,
    Downsample2D,
    Level,
    MidBlock2D,
    ResnetBlock2D,
    Style,
    Upsample2D,
)
from bidm_cli.networks.layers import Block, DenoisingNetwork, SkipJoin, sinusoidal_embedding, with_role


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear: [N, C] -> [N, E]."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.linear_1 = with_role(nn.Linear(channels, embedding), "time_embedding")
        self.linear_2 = with_role(nn.Linear(embedding, embedding), "time_embedding")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class DiffusersUNet(DenoisingNetwork):
    """The whole network; one entry of ``block_out_channels`` a resolution, finest first.

    Args:
        attention_levels, up_attention_levels: indices into ``block_out_channels`` of the resolutions with
            attention after each block, on the way down and up (the latter: as down).
        resnet_down_levels, resnet_up_levels: resolutions left by a residual block that resamples, not a conv.
        attention_head_dim: channels of a head; None for a single head.
        downsample_padding: see :class:`Downsample2D`.
        film: see :class:`Style`. mid_attention, mid_attention_norm, mid_scale: see :class:`MidBlock2D`.
        num_classes: rows of a label embedding added to the time embedding.
        time_embedding_dim: width of the time embedding; None: four times the finest level's.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int],
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (),
        up_attention_levels: Sequence[int] | None = None,
        resnet_down_levels: Sequence[int] = (),
        resnet_up_levels: Sequence[int] = (),
        attention_head_dim: int | None = 8,
        downsample_padding: int = 1,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        film: bool = False,
        mid_attention: bool = True,
        mid_attention_norm: bool = True,
        mid_scale: float = 1.0,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        num_classes: int | None = None,
        time_embedding_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths, ups = list(block_out_channels), up_attention_levels
        embedding = time_embedding_dim or 4 * widths[0]
        self.channels, self.depth = widths[0], layers_per_block
        self.freq_shift, self.order = freq_shift, "cos_sin" if flip_sin_to_cos else "sin_cos"
        style = Style(norm_num_groups, norm_eps, embedding, film, attention_head_dim, dropout)

        self.conv_in = with_role(nn.Conv2d(in_channels, widths[0], 3, padding=1), "stem")
        self.time_embedding = TimestepEmbedding(widths[0], embedding)
        self.class_embedding: nn.Module | None = None
        if num_classes is not None:
            self.class_embedding = with_role(nn.Embedding(num_classes, embedding), "class_embedding")
        skips = self._build_down(widths, style, attention_levels, resnet_down_levels, downsample_padding)
        self.mid_block = MidBlock2D(widths[-1], style, mid_attention, mid_attention_norm, mid_scale)
        self._build_up(widths, style, attention_levels if ups is None else ups, resnet_up_levels, skips)
        self.join = SkipJoin()
        self.conv_norm_out = style.norm(widths[0])
        self.conv_out = with_role(nn.Conv2d(widths[0], out_channels, 3, padding=1), "head")

    def _build_down(
        self,
        widths: list[int],
        style: Style,
        attention: Sequence[int],
        resnet_levels: Sequence[int],
        padding: int,
    ) -> list[int]:
        """Set ``down_blocks``; return the width of each skip connection."""
        skips, width = [widths[0]], widths[0]
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(widths):
            resnets = [ResnetBlock2D(width if j == 0 else out, out, style) for j in range(self.depth)]
            attentions = [Attention(out, style) for _ in resnets] if i in attention else []
            way: tuple[str, nn.Module] | None = None
            if i != len(widths) - 1:
                down = ResnetBlock2D(out, out, style, "down") if i in resnet_levels else None
                way = "downsamplers", down or Downsample2D(out, padding)
            self.down_blocks.append(Level(resnets, attentions, way))
            skips += [out] * (self.depth + (way is not None))
            width = out
        return skips

    def _build_up(
        self,
        widths: list[int],
        style: Style,
        attention: Sequence[int],
        resnet_levels: Sequence[int],
        skips: list[int],
    ) -> None:
        """Set ``up_blocks``, coarsest first."""
        width = widths[-1]
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            out, resnets = widths[i], []
            for _ in range(self.depth + 1):
                resnets.append(ResnetBlock2D(width + skips.pop(), out, style))
                width = out
            attentions = [Attention(out, style) for _ in resnets] if i in attention else []
            way: tuple[str, nn.Module] | None = None
            if i != 0:
                up = ResnetBlock2D(out, out, style, "up") if i in resnet_levels else None
                way = "upsamplers", up or Upsample2D(out)
            self.up_blocks.append(Level(resnets, attentions, way))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], t [N], labels y [N] where the network takes them.

        Raises:
            BidmError: the network needs labels and got none.
        """
        embedding = sinusoidal_embedding(t, self.channels, order=self.order, divisor_offset=self.freq_shift)
        embedding = self.time_embedding(embedding.to(x.dtype))
        if self.class_embedding is not None:
            if y is None:
                raise BidmError("this network is class-conditional and got no labels")
            embedding = embedding + self.class_embedding(y)

        h = self.conv_in(x)
        skips = [h]
        for level in _levels(self.down_blocks):
            for j in range(self.depth):
                h = level.block(j, h, embedding)
                skips.append(h)
            if level.resampler_name is not None:
                h = level.resampled(h, embedding)
                skips.append(h)
        h = self.mid_block(h, embedding)
        for level in _levels(self.up_blocks):
            for j in range(self.depth + 1):
                h = level.block(j, self.join(h, skips.pop()), embedding)
            h = level.resampled(h, embedding)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def blocks(self) -> list[Block]:
        found = [Block("conv_in", "encoder")]
        for i, level in enumerate(_levels(self.down_blocks)):
            found += [Block(f"down_blocks.{i}.{name}", "encoder") for name in _points(level)]
        found.append(Block("mid_block", "middle"))
        for i, level in enumerate(_levels(self.up_blocks)):
            found += [Block(f"up_blocks.{i}.{name}", "decoder") for name in _points(level)]
        return found


def _levels(modules: nn.ModuleList) -> list[Level]:
    return [module for module in modules if isinstance(module, Level)]


def _points(level: Level) -> list[str]:
    """Feature points of a level: what each residual block with its attention gives, and the resampler."""
    kind = "attentions" if level.has_attention else "resnets"
    found = [f"{kind}.{j}" for j in range(len(level.resnets))]
    return found if level.resampler_name is None else [*found, f"{level.resampler_name}.0"]
