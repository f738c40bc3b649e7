"""What diffusers' U-Nets have in common: levels on the way down and up, a middle, and how features run
through them.

:class:`bidm_cli.networks.diffusers.unet.DiffusersUNet` and
:class:`bidm_cli.networks.diffusers.condition_unet.DiffusersConditionUNet` say by :class:`LevelPlan` what
their levels are made of, and by :class:`TimeInput` how a time and a label become the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.diffusers.blocks import (
    Downsample2D,
    Level,
    MidBlock2D,
    ResnetBlock2D,
    Style,
    Upsample2D,
)
from bidm_cli.networks.layers import Block, DenoisingNetwork, SkipJoin, sinusoidal_embedding, with_role


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear: [N, C] -> [N, E]; ``role`` is its layers'."""

    def __init__(self, channels: int, embedding: int, role: str = "time_embedding") -> None:
        super().__init__()
        self.linear_1 = with_role(nn.Linear(channels, embedding), role)
        self.linear_2 = with_role(nn.Linear(embedding, embedding), role)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


@dataclass(frozen=True)
class LevelPlan:
    """What one resolution has on one way.

    Attributes:
        width: its channels.
        depth: residual blocks on the way down; the way up has one more.
        attention: makes the attention after block ``index``; None for none.
        resnet: the level is left by a residual block that resamples, not by a conv.
    """

    width: int
    depth: int
    attention: Callable[[int], nn.Module] | None = None
    resnet: bool = False

    def attentions(self, count: int) -> list[nn.Module]:
        return [] if self.attention is None else [self.attention(index) for index in range(count)]


@dataclass(frozen=True)
class TimeInput:
    """How a time, and a label, become the embedding.

    Attributes:
        channels: width of the sinusoidal embedding of the time.
        freq_shift, flip_sin_to_cos: its form (see :func:`sinusoidal_embedding`).
        embedding: width of the embedding.
        classes: rows of a label embedding; None for none.
        class_times: labels are embedded as times are, by layers of their own.
        learned_times: rows of a table that takes the sinusoidal embedding's place; None for none.
        center: the network sees 2 x - 1.
    """

    channels: int
    embedding: int
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    classes: int | None = None
    class_times: bool = False
    learned_times: int | None = None
    center: bool = False


class DiffusersSkeleton(DenoisingNetwork):
    """Base of the two U-Nets; a subclass calls :meth:`build` once with what it is made of."""

    def build(
        self,
        channels: tuple[int, int],
        downs: Sequence[LevelPlan],
        ups: Sequence[LevelPlan],
        mid: MidBlock2D | None,
        style: Style,
        time: TimeInput,
        padding: int,
        kernels: tuple[int, int] = (3, 3),
    ) -> None:
        """Set all layers.

        Args:
            channels: that go in and come out. kernels: of the first and the last conv.
            downs, ups: finest level first, both.
            padding: see :class:`Downsample2D`.
        """
        self.time, width = time, downs[0].width
        stem = nn.Conv2d(channels[0], width, kernels[0], padding=(kernels[0] - 1) // 2)
        self.conv_in = with_role(stem, "stem")
        if time.learned_times is not None:
            self.time_proj = nn.Embedding(time.learned_times, time.channels)
        self.time_embedding = TimestepEmbedding(time.channels, time.embedding)
        self.class_embedding: nn.Module | None = None
        if time.class_times:
            self.class_embedding = TimestepEmbedding(time.channels, time.embedding, "class_embedding")
        elif time.classes is not None:
            self.class_embedding = with_role(nn.Embedding(time.classes, time.embedding), "class_embedding")
        skips = self._build_down(downs, style, padding)
        self.mid_block = mid
        self._build_up(ups, style, skips)
        self.join = SkipJoin()
        self.conv_norm_out = style.norm(width)
        head = nn.Conv2d(width, channels[1], kernels[1], padding=(kernels[1] - 1) // 2)
        self.conv_out = with_role(head, "head")

    def _build_down(self, plans: Sequence[LevelPlan], style: Style, padding: int) -> list[int]:
        """Set ``down_blocks``; return the width of each skip connection."""
        skips, width = [plans[0].width], plans[0].width
        self.down_blocks = nn.ModuleList()
        for i, plan in enumerate(plans):
            out = plan.width
            resnets = [ResnetBlock2D(width if j == 0 else out, out, style) for j in range(plan.depth)]
            way: tuple[str, nn.Module] | None = None
            if i != len(plans) - 1:
                down = ResnetBlock2D(out, out, style, "down") if plan.resnet else None
                way = "downsamplers", down or Downsample2D(out, padding)
            self.down_blocks.append(Level(resnets, plan.attentions(plan.depth), way))
            skips += [out] * (plan.depth + (way is not None))
            width = out
        return skips

    def _build_up(self, plans: Sequence[LevelPlan], style: Style, skips: list[int]) -> None:
        """Set ``up_blocks``, coarsest first."""
        width = plans[-1].width
        self.up_blocks = nn.ModuleList()
        for i, plan in reversed(list(enumerate(plans))):
            out, resnets = plan.width, []
            for _ in range(plan.depth + 1):
                resnets.append(ResnetBlock2D(width + skips.pop(), out, style))
                width = out
            way: tuple[str, nn.Module] | None = None
            if i != 0:
                up = ResnetBlock2D(out, out, style, "up") if plan.resnet else None
                way = "upsamplers", up or Upsample2D(out)
            self.up_blocks.append(Level(resnets, plan.attentions(plan.depth + 1), way))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], t [N], context [N, L, D] and labels y [N] where the network takes them.

        Raises:
            BidmError: the network needs labels or a context and got none.
        """
        if self.inputs.context_width is not None and context is None:
            raise BidmError("this network attends to a context (such as embeddings of text) and got none")
        embedding = self._embed(x, t, y)
        h = self.conv_in(2 * x - 1 if self.time.center else x)
        skips = [h]
        for level in _levels(self.down_blocks):
            for j in range(len(level.resnets)):
                h = level.block(j, h, embedding, context)
                skips.append(h)
            if level.resampler_name is not None:
                h = level.resampled(h, embedding)
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding, context)
        for level in _levels(self.up_blocks):
            for j in range(len(level.resnets)):
                h = level.block(j, self.join(h, skips.pop()), embedding, context)
            h = level.resampled(h, embedding)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _embed(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        times = self.time_proj(t.long()) if self.time.learned_times else self._sinusoidal(t)
        embedding = self.time_embedding(times.to(x.dtype))
        if self.class_embedding is None:
            return embedding
        if y is None:
            raise BidmError("this network is class-conditional and got no labels")
        if not self.time.class_times:
            return embedding + self.class_embedding(y)
        labels = self.time_proj(y.long()) if self.time.learned_times else self._sinusoidal(y)
        return embedding + self.class_embedding(labels.to(x.dtype))

    def _sinusoidal(self, t: Tensor) -> Tensor:
        order = "cos_sin" if self.time.flip_sin_to_cos else "sin_cos"
        return sinusoidal_embedding(t, self.time.channels, order=order, divisor_offset=self.time.freq_shift)

    def blocks(self) -> list[Block]:
        found = [Block("conv_in", "encoder")]
        for i, level in enumerate(_levels(self.down_blocks)):
            found += [Block(f"down_blocks.{i}.{name}", "encoder") for name in _points(level)]
        if self.mid_block is not None:
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
