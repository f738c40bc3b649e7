"""The families' residual blocks on packed layers, with what lies between the layers moved into them.

Each class computes what its base class does, with the same layers under the same names. A norm and its SiLU
become the next layer's prologue, the time projection and the residual sum a layer's epilogue, so that
activations are read and written once. On the torch backend the same operations run one by one in the original
order. Inputs may be :class:`bidm_cli.packed.lazy.Lazy`.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks import ddpm_unet, lucidrains_unet, openai_blocks, score_unet, w86_unet
from bidm_cli.networks.diffusers import blocks as diffusers_blocks
from bidm_cli.packed.backend import Backend, Prologue
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.packed.lazy import Lazy, made, repeated


class FusedResnetBlock(ddpm_unet.ResnetBlock):
    """The DDPM family's."""

    def forward(self, x: Tensor | Lazy, embedding: Tensor | None = None) -> Tensor:
        offset = None if embedding is None else self.temb_proj(F.silu(embedding))
        h = self.conv1(x, Prologue(self.norm1, silu=True), offset)
        shortcut = None if self.shortcut_name is None else getattr(self, self.shortcut_name)
        return self.conv2(h, Prologue(self.norm2, silu=True), None, _skip(shortcut, x))


class FusedResBlock(openai_blocks.ResBlock):
    """That of the OpenAI and LDM networks."""

    def forward(self, x: Tensor | Lazy, embedding: Tensor) -> Tensor:
        projected = self.emb_layers(embedding)
        norm, _, conv = self.in_layers
        h, x = _first(conv, norm, x, None if self.film else projected, self.resample)
        scale, shift = projected.chunk(2, dim=1) if self.film else (None, None)
        between = Prologue(cast(nn.GroupNorm, self.out_layers[0]), True, scale, shift)
        return self.out_layers[-1](h, between, None, _skip(self.skip_connection, x))


class FusedResnetBlock2D(diffusers_blocks.ResnetBlock2D):
    """diffusers'."""

    def forward(self, x: Tensor | Lazy, embedding: Tensor | None = None) -> Tensor:
        projected = None if embedding is None else self.time_emb_proj(F.silu(embedding))
        film = self.film and projected is not None
        h, x = _first(self.conv1, self.norm1, x, None if film else projected, self.resample)
        scale, shift = projected.chunk(2, dim=1) if film else (None, None)  # type: ignore[union-attr]
        between = Prologue(self.norm2, True, scale, shift)
        h = self.conv2(h, between, None, _skip(self.conv_shortcut, x))
        return h if self.scale == 1.0 else h / self.scale


class FusedW86ResBlock(w86_unet.ResBlock):
    """w86763777's."""

    def forward(self, x: Tensor | Lazy, embedding: Tensor) -> Tensor:
        (norm1, _, conv1), (norm2, _, _, conv2) = self.block1, self.block2
        h = conv1(x, Prologue(cast(nn.GroupNorm, norm1), silu=True), self.temb_proj(embedding))
        between = Prologue(cast(nn.GroupNorm, norm2), silu=True)
        return self.attn(conv2(h, between, None, _skip(self.shortcut, x)))


class FusedScoreResnetBlock(score_unet.ResnetBlock):
    """That of the score-based models."""

    def forward(self, x: Tensor | Lazy, embedding: Tensor) -> Tensor:
        offset = self.Dense_0(F.silu(embedding))
        if self.resample is not None and self.fir:
            x = made(x)
            before = Prologue(cast(nn.GroupNorm, self.GroupNorm_0), silu=True)
            normed = _backend(self.Conv_0).normalize(x, before)
            h, x = self.Conv_0(self._resampled(normed), None, offset), self._resampled(x)
        else:
            h, x = _first(self.Conv_0, self.GroupNorm_0, x, offset, self.resample)
        shortcut = None if self.shortcut_name is None else getattr(self, self.shortcut_name)
        between = Prologue(cast(nn.GroupNorm, self.GroupNorm_1), silu=True)
        h = self.Conv_1(h, between, None, _skip(shortcut, x))
        return h if self.scale == 1.0 else h * self.scale


class FusedLucidrainsResnetBlock(lucidrains_unet.LucidrainsResnetBlock):
    """lucidrains': the norms come after the convolutions, so the second one's is applied alone."""

    def forward(self, x: Tensor | Lazy, embedding: Tensor) -> Tensor:
        on_gpu = _backend(self.block1.proj).name == "cupy"
        if on_gpu and not isinstance(self.block1.norm, nn.GroupNorm):
            return super().forward(made(x), embedding)
        scale, shift = self.mlp(embedding).chunk(2, dim=1)
        h = self.block1.proj(x)
        h = self.block2.proj(h, Prologue(cast(nn.GroupNorm, self.block1.norm), True, scale, shift))
        after = Prologue(cast(nn.GroupNorm, self.block2.norm), silu=True)
        h = _backend(self.block2.proj).normalize(h, after)
        if isinstance(self.res_conv, PackedLayer):
            return self.res_conv(x, None, None, h)
        return h + _skip(self.res_conv, x)


def _first(
    conv: nn.Module, norm: nn.Module, x: Tensor | Lazy, offset: Tensor | None, resample: str | None
) -> tuple[Tensor, Tensor | Lazy]:
    """(the first convolution of normed x, x for the shortcut), both resampled where the block does that."""
    before = Prologue(cast(nn.GroupNorm, norm), silu=True)
    if resample is None:
        return conv(x, before, offset), x
    x, backend = made(x), _backend(conv)
    normed = backend.normalize(x, before)
    if resample == "down":
        return conv(F.avg_pool2d(normed, 2), None, offset), F.avg_pool2d(x, 2)
    return conv(repeated(normed, backend), None, offset), repeated(x, backend)


def _backend(layer: nn.Module) -> Backend:
    return cast(Backend, layer.backend)


def _skip(layer: nn.Module | None, x: Tensor | Lazy) -> Tensor:
    """x through the shortcut's layer, if there is one."""
    if layer is None or isinstance(layer, nn.Identity):
        return made(x)
    return layer(x if isinstance(layer, PackedLayer) else made(x))
