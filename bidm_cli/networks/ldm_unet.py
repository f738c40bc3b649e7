"""The U-Net of latent diffusion (CompVis ``openaimodel.UNetModel``) and, by its options, of OpenAI's
improved-diffusion and guided-diffusion: the same key names, so weights load with ``strict=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.fusion import Prologue, fused_conv
from bidm_cli.networks.layers import (
    Block,
    DenoisingNetwork,
    NetworkInputs,
    SkipJoin,
    conv3x3,
    embedding_layers,
    feature_points,
    sinusoidal_embedding,
    with_role,
)
from bidm_cli.networks.openai_blocks import AttentionBlock, ResBlock, Stage, group_norm
from bidm_cli.networks.spatial_transformer import SpatialTransformer
from bidm_cli.networks.unet_blocks import Downsample, Resample, Upsample, level_inputs

Setting = TypeVar("Setting", int, bool)


class LDMUNet(DenoisingNetwork):
    """The whole network; one entry of ``channel_mult`` per resolution, finest first.

    The arguments have the original constructor's names.

    Args:
        out_channels: twice the image's where the network also predicts the variance (learned sigma).
        num_res_blocks: blocks per resolution, one number or one for each.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which blocks have attention.
        conv_resample: convs in down- and upsamplers; otherwise average and nearest neighbour alone.
        num_classes: rows of a label embedding added to the time embedding.
        adm_in_channels: instead of labels, width of a vector brought to the time embedding by ``adm_layers``
            linear layers (2: "sequential", unCLIP; 1: "continuous").
        num_heads: attention heads; ``num_head_channels``, channels of one head, goes first if not -1.
        num_heads_upsample: heads in the decoder's attention blocks if not -1 (without head channels).
        use_scale_shift_norm: FiLM.
        resblock_updown: residual blocks that resample, in the place of down- and upsamplers.
        use_new_attention_order: see :class:`AttentionBlock`.
        use_spatial_transformer: spatial transformers instead of attention blocks, ``transformer_depth``
            blocks deep, with a context ``context_dim`` wide (one number, or one per block).
        use_linear_in_transformer: their projections are linear layers (Stable Diffusion 2).
        num_attention_blocks: blocks with attention per resolution, in encoder and decoder; default: all.
        disable_self_attentions: for each resolution, whether its transformers attend to the context alone.
        disable_middle_self_attn: the same for the middle's.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int | Sequence[int],
        channel_mult: Sequence[float],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        conv_resample: bool = True,
        num_classes: int | None = None,
        adm_in_channels: int | None = None,
        adm_layers: int = 2,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | Sequence[int] | None = None,
        use_linear_in_transformer: bool = False,
        num_attention_blocks: Sequence[int] | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        disable_middle_self_attn: bool = False,
    ) -> None:
        super().__init__()
        widths = [int(mult * model_channels) for mult in channel_mult]
        if not widths or min(widths) < 1:
            raise ValueError(f"channel_mult {list(channel_mult)} gives no usable widths")
        levels = len(widths)
        depths = _by_level(num_res_blocks, levels, "num_res_blocks")
        if num_attention_blocks is None:
            num_attention_blocks = [depth + 1 for depth in depths]
        most = _by_level(num_attention_blocks, levels, "num_attention_blocks")
        self.attended = [most[i] if 2**i in attention_resolutions else 0 for i in range(levels)]
        """Blocks with attention of each level, counted from its first; the decoder has one more."""
        alone = False if disable_self_attentions is None else disable_self_attentions
        self.context_alone = _by_level(alone, levels, "disable_self_attentions")
        self.model_channels = model_channels
        self.conv_resample, self.resblock_updown = conv_resample, resblock_updown
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.new_attention_order = use_new_attention_order
        self.spatial_transformer = use_spatial_transformer
        self.linear_in_transformer = use_linear_in_transformer
        self.context_widths = _per_block(context_dim, transformer_depth)
        embedding = 4 * model_channels
        self._res_block: Callable[..., nn.Module] = partial(
            ResBlock, embedding=embedding, film=use_scale_shift_norm, dropout=dropout
        )
        context = self.context_widths[0] if use_spatial_transformer else None
        self.inputs = NetworkInputs(in_channels, context, vector_width=adm_in_channels)

        self.time_embed = nn.Sequential(*embedding_layers(model_channels, embedding))
        self.label_emb: nn.Module | None = None
        if num_classes is not None:
            self.label_emb = with_role(nn.Embedding(num_classes, embedding), "class_embedding")
        elif adm_in_channels is not None:
            both = embedding_layers(adm_in_channels, embedding, role="class_embedding")
            self.label_emb = both[0] if adm_layers == 1 else nn.Sequential(nn.Sequential(*both))

        downs, ups = level_inputs(widths[0], widths, depths)
        self._build_encoder(in_channels, widths, downs)
        self.middle_block = Stage(
            self._res_block(widths[-1], widths[-1]),
            self._attention(widths[-1], self.num_heads, disable_middle_self_attn),
            self._res_block(widths[-1], widths[-1]),
        )
        self._build_decoder(widths, ups)
        self.join = SkipJoin()
        self.out = nn.Sequential(group_norm(widths[0]), nn.SiLU(), conv3x3(widths[0], out_channels, "head"))

    def _build_encoder(self, in_channels: int, widths: list[int], inputs: list[list[int]]) -> None:
        self.input_blocks = nn.ModuleList([Stage(conv3x3(in_channels, widths[0], "stem"))])
        for level, width in enumerate(widths):
            for index, channels in enumerate(inputs[level]):
                attention = self._attention_at(level, index, width, self.num_heads)
                self.input_blocks.append(Stage(self._res_block(channels, width), *attention))
            if level != len(widths) - 1:
                self.input_blocks.append(Stage(self._resampler(width, "down")))

    def _build_decoder(self, widths: list[int], inputs: list[list[int]]) -> None:
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index, channels in enumerate(inputs[level]):
                layers = [self._res_block(channels, width)]
                layers += self._attention_at(level, index, width, self.num_heads_upsample)
                if level and index == len(inputs[level]) - 1:
                    layers.append(self._resampler(width, "up"))
                self.output_blocks.append(Stage(*layers))

    def _resampler(self, channels: int, resample: Resample) -> nn.Module:
        if self.resblock_updown:
            return self._res_block(channels, channels, resample=resample)
        if resample == "up":
            return Upsample(channels, self.conv_resample)
        return Downsample(channels, self.conv_resample, name="op")

    def _attention_at(self, level: int, index: int, channels: int, heads: int) -> list[nn.Module]:
        """The attention of a resolution's block ``index``, if it has one."""
        if index >= self.attended[level]:
            return []
        return [self._attention(channels, heads, self.context_alone[level])]

    def _attention(self, channels: int, heads: int, context_alone: bool = False) -> nn.Module:
        if self.spatial_transformer:
            # The original gives its decoder's transformers the encoder's number of heads.
            heads = self.num_heads
        if self.num_head_channels != -1:
            heads = channels // self.num_head_channels
        if not self.spatial_transformer:
            return AttentionBlock(channels, heads, self.new_attention_order)
        if not 1 <= heads <= channels:
            raise ValueError(f"attention over {channels} channels cannot have {heads} heads")
        shape = (channels, heads, channels // heads, self.context_widths, self.linear_in_transformer)
        return SpatialTransformer(*shape, self_attention=not context_alone)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], t [N], context [N, L, D] and labels y [N] where the network takes them.

        Raises:
            BidmError: the network needs a context or labels and got none.
        """
        self._check_conditions(context, y)
        embedding = sinusoidal_embedding(t, self.model_channels, order="cos_sin", divisor_offset=0)
        embedding = self.time_embed(embedding.to(x.dtype))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(y)

        h, skips = x, []
        for stage in self.input_blocks:
            h = stage(h, embedding, context)
            skips.append(h)
        h = self.middle_block(h, embedding, context)
        for stage in self.output_blocks:
            h = stage(self.join(h, skips.pop()), embedding, context)
        norm, _, conv = self.out
        return fused_conv(conv, h, prologue=Prologue(norm, silu=True))

    def _check_conditions(self, context: Tensor | None, y: Tensor | None) -> None:
        if len(set(self.context_widths)) > 1:
            raise BidmError(
                f"this network's blocks attend to contexts of different widths, {self.context_widths}, which "
                "bidm cannot give"
            )
        if self.spatial_transformer and context is None and self.context_widths[0] is not None:
            raise BidmError(
                "this network attends to a context (a class or text embedding) and got none; give a label "
                f"or embeddings [N, L, {self.context_widths[0]}]"
            )
        if self.label_emb is not None and y is None:
            raise BidmError("this network is conditional on y and got none: labels, or vectors for unCLIP")

    def blocks(self) -> list[Block]:
        return feature_points(self.members("input_blocks"), ["middle_block"], self.members("output_blocks"))


def _by_level(setting: Setting | Sequence[Setting], levels: int, name: str) -> list[Setting]:
    values = list(setting) if isinstance(setting, Sequence) else [setting] * levels
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} entries, channel_mult {levels}")
    return values


def _per_block(context_dim: int | Sequence[int] | None, depth: int) -> list[int | None]:
    """The context's width for each transformer block."""
    widths: list[int | None] = list(context_dim) if isinstance(context_dim, Sequence) else [context_dim]
    if len(widths) not in (1, depth):
        raise ValueError(f"context_dim has {len(widths)} entries for a transformer_depth of {depth}")
    return widths * depth if len(widths) == 1 else widths
