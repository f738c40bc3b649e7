"""diffusers' ``UNet2DModel`` under its own key names: the DDPM and LDM U-Nets in one class with options."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bidm_cli.networks.diffusers.blocks import Attention, MidBlock2D, Style
from bidm_cli.networks.diffusers.skeleton import DiffusersSkeleton, TimeInput
from bidm_cli.networks.layers import NetworkInputs


class DiffusersUNet(DiffusersSkeleton):
    """The whole network; one entry of ``block_out_channels`` per resolution, finest first.

    Args:
        attention_levels, up_attention_levels: indices into ``block_out_channels`` of the resolutions with
            attention after each block, on the way down and up (the latter: as down).
        resnet_down_levels, resnet_up_levels: resolutions left by a residual block that resamples, not a conv.
        attention_head_dim: channels of a head; None for a single head.
        downsample_padding: see :class:`bidm_cli.networks.unet_blocks.Downsample`.
        film: see :class:`Style`.
        mid_block: whether there is one; mid_attention: whether it has attention, mid_attention_norm with a
            group norm of mid_attention_groups (None: norm_num_groups). mid_scale: see :class:`MidBlock2D`.
        num_classes: rows of a label embedding added to the time embedding.
        class_times, learned_times, center_input: see :class:`TimeInput`.
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
        mid_block: bool = True,
        mid_attention: bool = True,
        mid_attention_norm: bool = True,
        mid_attention_groups: int | None = None,
        mid_scale: float = 1.0,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        num_classes: int | None = None,
        class_times: bool = False,
        learned_times: int | None = None,
        center_input: bool = False,
        time_embedding_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(in_channels)
        widths = list(block_out_channels)
        ups = attention_levels if up_attention_levels is None else up_attention_levels
        embedding = time_embedding_dim or 4 * widths[0]
        style = Style(norm_num_groups, norm_eps, embedding, film, attention_head_dim, dropout)

        def attentions(level: int, count: int, up: bool) -> list[nn.Module]:
            attends = level in (ups if up else attention_levels)
            return [Attention(widths[level], style) for _ in range(count) if attends]

        attention: Attention | None = None
        if mid_attention:
            groups = mid_attention_groups if mid_attention_norm else 0
            attention = Attention(widths[-1], style, groups, mid_scale)
        self.build(
            (in_channels, out_channels),
            widths,
            [layers_per_block] * len(widths),
            attentions,
            (resnet_down_levels, resnet_up_levels),
            MidBlock2D(widths[-1], style, attention, mid_scale) if mid_block else None,
            style,
            TimeInput(
                widths[0], embedding, freq_shift, flip_sin_to_cos, num_classes, class_times, learned_times,
                center_input,
            ),
            downsample_padding,
        )  # fmt: skip
