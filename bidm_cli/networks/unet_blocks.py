"""Parts that the U-Nets share: residual blocks, attention between positions, resamplers, levels.

A family's classes add the names under which its weights load with ``load_state_dict(strict=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import (
    Features,
    Prologue,
    fused_conv,
    joined,
    read_in_place,
    shortcut,
    upsampled,
)
from bidm_cli.networks.layers import (
    AsymmetricConv2d,
    AttentionProduct,
    Block,
    DenoisingNetwork,
    SkipJoin,
    conv3x3,
    feature_points,
    with_role,
)

Resample = Literal["up", "down"]


def residual_layers(
    norm: Callable[[int], nn.Module],
    channels: int,
    out_channels: int,
    embedding: int | None,
    *,
    film: bool = False,
    dropout: float = 0.0,
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module, nn.Module, nn.Module]:
    """Norm, conv, projection of the embedding (if any), norm, dropout and conv of a residual block."""
    projection: nn.Module = nn.Identity()
    if embedding is not None:
        width = 2 * out_channels if film else out_channels
        projection = with_role(nn.Linear(embedding, width), "time_projection")
    first, second = (conv3x3(width, out_channels, "conv") for width in (channels, out_channels))
    return norm(channels), first, projection, norm(out_channels), nn.Dropout(dropout), second


def skip_conv(channels: int, out_channels: int, kernel: int = 1, always: bool = False) -> nn.Module:
    """Conv on a residual block's shortcut where the width changes, or ``always``; else the identity."""
    if channels == out_channels and not always:
        return nn.Identity()
    return with_role(nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2), "skip")


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, + embedding, norm, SiLU, dropout, conv, + shortcut: [N, C, H, W] -> [N, O, H', W'].

    Attributes:
        film: the embedding scales and shifts the second norm's result (scale first) instead of being added.
        resample: "up" or "down" changes H and W by 2 inside the block, before the first conv.
    """

    film = False
    resample: Resample | None = None

    def layers(self) -> Sequence[nn.Module]:
        """The layers of :func:`residual_layers` and the shortcut's."""
        raise NotImplementedError

    def forward(self, x: Features, embedding: Tensor | None = None) -> Tensor:
        norm1, conv1, projection, norm2, dropout, conv2, skip = self.layers()
        offset = None if embedding is None else projection(F.silu(embedding))
        scale = shift = None
        if self.film and offset is not None:
            (scale, shift), offset = offset.chunk(2, dim=1), None
        before = Prologue(norm1, silu=True)
        h, x, upsample = self.first(conv1, read_in_place(conv1, x), before, offset)
        between = Prologue(norm2, True, scale, shift, dropout)
        return fused_conv(conv2, h, prologue=between, residual=shortcut(skip, x, upsample))

    def first(
        self, conv: nn.Module, x: Features, prologue: Prologue, offset: Tensor | None
    ) -> tuple[Tensor, Features, int]:
        """(the first conv's result, x for the shortcut, the factor by which the shortcut upsamples it)."""
        if self.resample is None:
            return fused_conv(conv, x, prologue=prologue, offset=offset), x, 1
        x = joined(x)
        if self.resample == "up":
            return fused_conv(conv, x, prologue=prologue, upsample=2, offset=offset), x, 2
        return fused_conv(conv, F.avg_pool2d(prologue(x), 2), offset=offset), F.avg_pool2d(x, 2), 1


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions, with a residual: [N, C, H, W] -> [N, C, H, W].

    Args:
        names: of the norm, the 1x1 convs to q, k and v, and that of the result.
        scale: the sum is multiplied by it.
    """

    def __init__(self, norm: nn.GroupNorm, names: Sequence[str], scale: float = 1.0) -> None:
        super().__init__()
        self.names, self.scale, channels = names, scale, norm.num_channels
        self.add_module(names[0], norm)
        for name in names[1:]:
            role = "attention_out" if name == names[-1] else "attention_qkv"
            self.add_module(name, with_role(nn.Conv2d(channels, channels, 1), role))
        self.product = AttentionProduct()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        norm, q, k, v, out = (getattr(self, name) for name in self.names)
        h = norm(x)
        tokens = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (q, k, v))
        attended = self.product(*tokens)[:, 0].transpose(1, 2).reshape(x.shape)
        h = fused_conv(out, attended, residual=x)
        return h if self.scale == 1.0 else h * self.scale


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then a 3x3 conv unless ``with_conv`` is false."""

    def __init__(
        self, channels: int, with_conv: bool = True, *, out_channels: int | None = None, name: str = "conv"
    ) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, conv3x3(channels, out_channels or channels, "resample") if with_conv else None)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        conv = getattr(self, self.name)
        return upsampled(x, 2) if conv is None else fused_conv(conv, x, upsample=2)


class Downsample(nn.Module):
    """Halve H and W by a 3x3 stride-2 conv, or by a 2x2 average if ``with_conv`` is false.

    Args:
        padding: of the conv, 1 on all sides, or 0: right and bottom only.
    """

    def __init__(
        self,
        channels: int,
        with_conv: bool = True,
        *,
        padding: int = 1,
        out_channels: int | None = None,
        name: str = "conv",
        role: str = "resample",
    ) -> None:
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"downsample_padding is {padding}; 0 or 1 make sense")
        self.name, out = name, out_channels or channels
        conv = (
            AsymmetricConv2d(channels, out, 3, 2, (0, 1, 0, 1))
            if padding == 0
            else nn.Conv2d(channels, out, 3, 2, 1)
        )
        self.add_module(name, with_role(conv, role) if with_conv else None)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        conv = getattr(self, self.name)
        return F.avg_pool2d(x, 2) if conv is None else conv(x)


def level_inputs(
    stem: int, widths: Sequence[int], depths: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Input channels of the residual blocks of the encoder and of the decoder, by level, finest first.

    A level has ``depths[i]`` blocks in the encoder, and one more in the decoder, each of which reads a skip
    connection besides: the outputs of the stem, the blocks and the downsamplers, last one first.
    """
    downs: list[list[int]] = []
    ups: list[list[int]] = []
    skips, width = [stem], stem
    for out, depth in zip(widths, depths, strict=True):
        downs.append([width, *[out] * (depth - 1)])
        skips += [out] * (depth + 1)
        width = out
    skips.pop()  # the coarsest level has no downsampler
    for out, depth in reversed(list(zip(widths, depths, strict=True))):
        ups.insert(0, [channels + skips.pop() for channels in (width, *[out] * depth)])
        width = out
    return downs, ups


class Level(nn.Module):
    """One resolution: residual blocks, an attention after each if there are any, and a resampler.

    Args:
        names: of the blocks' list and the attentions'.
        resampler: its name ("downsample", or "downsamplers.0" for one in a list) and module; None at the
            last level.
    """

    def __init__(
        self,
        sections: Mapping[str, Sequence[nn.Module]],
        names: tuple[str, str],
        resampler: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        for name, modules in sections.items():
            self.add_module(name, nn.ModuleList(modules))
        self.names, self.count = names, len(sections[names[0]])
        self.has_attention, self.resampler = len(sections[names[1]]) > 0, None
        if resampler is not None:
            self.resampler, module = resampler
            name, _, index = self.resampler.partition(".")
            self.add_module(name, nn.ModuleList([module]) if index else module)

    def run(
        self, index: int, x: Features, embedding: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Residual block ``index`` and its attention."""
        h = getattr(self, self.names[0])[index](x, embedding)
        return getattr(self, self.names[1])[index](h, context) if self.has_attention else h

    def resampled(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x through the resampler; as it is at the last level."""
        return x if self.resampler is None else self.get_submodule(self.resampler)(x, embedding)

    def forward(self, x: Tensor) -> Tensor:
        """All blocks and the resampler, without embedding or skip connections."""
        for index in range(self.count):
            x = self.run(index, x)
        return self.resampled(x)

    def points(self) -> list[str]:
        """Feature points: each residual block with its attention, and the resampler."""
        points = [f"{self.names[self.has_attention]}.{index}" for index in range(self.count)]
        return points if self.resampler is None else [*points, self.resampler]


class LevelUNet(DenoisingNetwork):
    """U-Net of :class:`Level`; a subclass sets ``conv_in``, ``join`` and the levels.

    Attributes:
        names: of the encoder's and the decoder's levels.
        finest_first: the decoder's levels are kept in the encoder's order, not in that of execution.
        middle_point: name of the middle's feature point.
    """

    join: SkipJoin
    names = ("down", "up")
    finest_first = True
    middle_point: str | None = None

    def levels(self) -> tuple[dict[str, Level], dict[str, Level]]:
        """Encoder's and decoder's levels by name, in the order of execution."""
        down, up = (
            [(f"{name}.{i}", level) for i, level in enumerate(getattr(self, name))] for name in self.names
        )
        return dict(down), dict(up[::-1] if self.finest_first else up)

    def run_levels(
        self, h: Tensor, middle: nn.Module | None, embedding: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Levels and middle on the stem's output h, with the skip connections."""
        down, up = self.levels()
        skips = [h]
        for level in down.values():
            for j in range(level.count):
                h = level.run(j, h, embedding, context)
                skips.append(h)
            if level.resampler is not None:
                h = level.resampled(h, embedding)
                skips.append(h)
        if middle is not None:
            h = middle(h, embedding, context)
        for level in up.values():
            for j in range(level.count):
                h = level.run(j, self.join(h, skips.pop()), embedding, context)
            h = level.resampled(h, embedding)
        return h

    def blocks(self) -> list[Block]:
        down, up = (
            [f"{name}.{point}" for name, level in levels.items() for point in level.points()]
            for levels in self.levels()
        )
        return feature_points(["conv_in", *down], [self.middle_point] if self.middle_point else [], up)
