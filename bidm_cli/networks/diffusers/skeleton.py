"""Levels, middle and time embedding of diffusers' U-Nets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.diffusers.blocks import MidBlock2D, ResnetBlock2D, Style, level
from bidm_cli.networks.fusion import Prologue, fused_conv
from bidm_cli.networks.layers import SkipJoin, embedding_layers, sinusoidal_embedding, with_role
from bidm_cli.networks.unet_blocks import Downsample, Level, LevelUNet, Upsample, level_inputs


@dataclass(frozen=True)
class TimeInput:
    """Form of the embedding of a time, and of a label.

    Attributes:
        channels: width of the sinusoidal embedding of the time.
        embedding: width of the embedding.
        freq_shift, flip_sin_to_cos: form of the sinusoidal embedding (see :func:`sinusoidal_embedding`).
        classes: rows of a label embedding; None for none.
        class_times: labels are embedded as times are, by layers of their own.
        learned_times: rows of a table that takes the sinusoidal embedding's place; None for none.
        center: the network sees 2 x - 1.
    """

    channels: int
    embedding: int
    freq_shift: int
    flip_sin_to_cos: bool
    classes: int | None
    class_times: bool
    learned_times: int | None
    center: bool

    def layers(self, role: str) -> nn.Module:
        """Linear, SiLU, Linear: [N, channels] -> [N, embedding]."""
        first, activation, second = embedding_layers(self.channels, self.embedding, role=role)
        return nn.Sequential(OrderedDict(linear_1=first, act=activation, linear_2=second))


class DiffusersSkeleton(LevelUNet):
    """Base of the two U-Nets; a subclass calls :meth:`build` once with what it is made of."""

    names = ("down_blocks", "up_blocks")
    finest_first = False

    def build(
        self,
        channels: tuple[int, int],
        widths: Sequence[int],
        depths: Sequence[int],
        attentions: Callable[[int, int, bool], list[nn.Module]],
        resnet_levels: tuple[Sequence[int], Sequence[int]],
        mid: MidBlock2D | None,
        style: Style,
        time: TimeInput,
        padding: int,
        kernels: tuple[int, int] = (3, 3),
    ) -> None:
        """Set all layers.

        Args:
            channels: that go in and come out. kernels: of the first and the last conv.
            widths, depths: channels and encoder blocks of each level, finest first.
            attentions: from a level, its number of blocks, and whether it is the decoder's.
            resnet_levels: those of the encoder and the decoder left by a residual block, not a conv.
            padding: see :class:`Downsample`.
        """
        self.time = time
        stem = nn.Conv2d(channels[0], widths[0], kernels[0], padding=(kernels[0] - 1) // 2)
        self.conv_in = with_role(stem, "stem")
        if time.learned_times is not None:
            self.time_proj = nn.Embedding(time.learned_times, time.channels)
        self.time_embedding = time.layers("time_embedding")
        self.class_embedding: nn.Module | None = None
        if time.class_times:
            self.class_embedding = time.layers("class_embedding")
        elif time.classes is not None:
            self.class_embedding = with_role(nn.Embedding(time.classes, time.embedding), "class_embedding")
        downs: list[Level] = []
        ups: list[Level] = []
        for i, (width, inputs, skipped) in enumerate(
            zip(widths, *level_inputs(widths[0], widths, depths), strict=True)
        ):
            down: tuple[str, nn.Module] | None = None
            if i != len(widths) - 1:
                resnet = ResnetBlock2D(width, width, style, "down") if i in resnet_levels[0] else None
                down = "downsamplers.0", resnet or Downsample(width, padding=padding)
            downs.append(level(inputs, width, style, attentions(i, len(inputs), False), down))
            up: tuple[str, nn.Module] | None = None
            if i:
                resnet = ResnetBlock2D(width, width, style, "up") if i in resnet_levels[1] else None
                up = "upsamplers.0", resnet or Upsample(width)
            ups.insert(0, level(skipped, width, style, attentions(i, len(skipped), True), up))
        self.down_blocks = nn.ModuleList(downs)
        self.mid_block, self.middle_point = mid, None if mid is None else "mid_block"
        self.up_blocks = nn.ModuleList(ups)
        self.join = SkipJoin()
        self.conv_norm_out = style.norm(widths[0])
        head = nn.Conv2d(widths[0], channels[1], kernels[1], padding=(kernels[1] - 1) // 2)
        self.conv_out = with_role(head, "head")

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], t [N], context [N, L, D] and labels y [N] where the network takes them.

        Raises:
            BidmError: the network needs labels or a context and got none.
        """
        if self.inputs.context_width is not None and context is None:
            raise BidmError("this network attends to a context (such as embeddings of text) and got none")
        embedding = self.time_embedding(self._of_time(t).to(x.dtype))
        if self.class_embedding is not None:
            if y is None:
                raise BidmError("this network is class-conditional and got no labels")
            labels = self._of_time(y).to(x.dtype) if self.time.class_times else y
            embedding = embedding + self.class_embedding(labels)
        h = self.conv_in(2 * x - 1 if self.time.center else x)
        h = self.run_levels(h, self.mid_block, embedding, context)
        return fused_conv(self.conv_out, h, prologue=Prologue(self.conv_norm_out, silu=True))

    def _of_time(self, t: Tensor) -> Tensor:
        """Learned or sinusoidal embedding of t [N], or of labels that are embedded as times."""
        if self.time.learned_times:
            return self.time_proj(t.long())
        order = "cos_sin" if self.time.flip_sin_to_cos else "sin_cos"
        return sinusoidal_embedding(t, self.time.channels, order=order, divisor_offset=self.time.freq_shift)
