"""diffusers' ``UNet2DConditionModel`` under its own key names: Stable Diffusion's U-Net and its like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from bidm_cli.networks.diffusers.blocks import Attention, MidBlock2D, Style
from bidm_cli.networks.diffusers.skeleton import DiffusersSkeleton, TimeInput
from bidm_cli.networks.layers import NetworkInputs
from bidm_cli.networks.spatial_transformer import SpatialTransformer

Depth = int | Sequence[int]
"""Transformer blocks after each residual block of a level: one number, or one per residual block."""


class DiffusersConditionUNet(DiffusersSkeleton):
    """The whole network; lists have one entry per resolution, finest first.

    Args:
        layers_per_block: residual blocks on the way down; the way up has one more.
        down_attention, up_attention: what comes after each residual block: "cross" (a spatial transformer),
            "self" (attention over the positions alone) or "none".
        num_heads: of the transformers. "self" takes it for the channels of a head, and on the way up reads it
            coarsest level first: so does the original.
        context_dim: width of the context; None for a network that attends to none.
        transformer_depth, up_transformer_depth: blocks of the transformers (up: as down).
        only_cross: levels whose transformers have no self-attention, but attend to the context twice (the
            middle's always has).
        linear_projection: see :class:`SpatialTransformer`.
        mid_block: "cross" (block, transformer, block), "plain" (one block) or None.
        conv_in_kernel, conv_out_kernel: sizes of the first and last conv.

    The others are :class:`bidm_cli.networks.diffusers.unet.DiffusersUNet`'s.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int],
        layers_per_block: Sequence[int],
        down_attention: Sequence[str],
        up_attention: Sequence[str],
        num_heads: Sequence[int],
        context_dim: int | None,
        transformer_depth: Sequence[Depth] = (),
        up_transformer_depth: Sequence[Depth] | None = None,
        only_cross: Sequence[bool] = (),
        linear_projection: bool = False,
        mid_block: Literal["cross", "plain"] | None = "cross",
        mid_scale: float = 1.0,
        resnet_down_levels: Sequence[int] = (),
        resnet_up_levels: Sequence[int] = (),
        downsample_padding: int = 1,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        film: bool = False,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        num_classes: int | None = None,
        class_times: bool = False,
        center_input: bool = False,
        time_embedding_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(in_channels, context_dim)
        widths = list(block_out_channels)
        depths = list(transformer_depth) or [1] * len(widths)
        only_cross = list(only_cross) or [False] * len(widths)
        embedding = time_embedding_dim or 4 * widths[0]
        style = Style(norm_num_groups, norm_eps, embedding, film, None, dropout)

        def transformer(level: int, depth: Depth, index: int, only: bool) -> nn.Module:
            blocks = depth if isinstance(depth, int) else depth[index]
            shape = (widths[level], num_heads[level], widths[level] // num_heads[level])
            contexts = [context_dim] * blocks
            return SpatialTransformer(*shape, contexts, linear_projection, not only, norm_num_groups)

        def attentions(level: int, count: int, up: bool) -> list[nn.Module]:
            kind = (up_attention if up else down_attention)[level]
            if kind == "cross":
                depth = ((up_transformer_depth or depths) if up else depths)[level]
                return [transformer(level, depth, index, only_cross[level]) for index in range(count)]
            head_width = num_heads[-1 - level if up else level]
            heads = Style(norm_num_groups, norm_eps, head_width=head_width)
            return [Attention(widths[level], heads) for _ in range(count) if kind == "self"]

        middle: MidBlock2D | None = None
        if mid_block is not None:
            last = len(widths) - 1
            between = transformer(last, depths[-1], 0, False) if mid_block == "cross" else None
            middle = MidBlock2D(widths[-1], style, between, mid_scale, 2 if mid_block == "cross" else 1)
        self.build(
            (in_channels, out_channels),
            widths,
            layers_per_block[: len(widths)],
            attentions,
            (resnet_down_levels, resnet_up_levels),
            middle,
            style,
            TimeInput(
                widths[0], embedding, freq_shift, flip_sin_to_cos, num_classes, class_times, None,
                center_input,
            ),
            downsample_padding,
            (conv_in_kernel, conv_out_kernel),
        )  # fmt: skip
