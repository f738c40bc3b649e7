"""Upsamplers and skip connections on packed layers: what they would make is only described to the next layer.

Nearest neighbour upsampling and concatenation move numbers and compute nothing; a packed convolution reads
the originals (:mod:`bidm_cli.packed.lazy`), on backends that can.
"""

from __future__ import annotations

from torch import Tensor, nn

from bidm_cli.networks import ddpm_unet, openai_blocks, score_unet, w86_unet
from bidm_cli.networks.diffusers import blocks as diffusers_blocks
from bidm_cli.networks.layers import SkipJoin
from bidm_cli.packed.layers import RunsOnBackend
from bidm_cli.packed.lazy import Lazy, repeated


class PackedJoin(RunsOnBackend, SkipJoin):
    """Features side by side, for fused residual blocks."""

    def forward(self, h: Tensor, skip: Tensor) -> Tensor | Lazy:  # type: ignore[override]
        return Lazy((h, skip)) if self.backend.reads_lazily else super().forward(h, skip)


class FusedUpsample(ddpm_unet.Upsample):
    """The DDPM family's, with its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv is not None
        return self.conv(repeated(x, self.conv.backend))


class FusedOpenAIUpsample(openai_blocks.Upsample):
    """That of the OpenAI and LDM networks, with its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv is not None
        return self.conv(repeated(x, self.conv.backend))


class FusedUpsample2D(diffusers_blocks.Upsample2D):
    """diffusers'."""

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.conv(repeated(x, self.conv.backend))


class FusedResample(w86_unet.Resample):
    """w86763777's."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.main(repeated(x, self.main.backend) if self.up else x)


class FusedScoreUpsample(score_unet.Upsample):
    """That of the score-based models, with its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.Conv_0(repeated(x, self.Conv_0.backend))


class PackedNearest(RunsOnBackend, nn.Upsample):
    """lucidrains' twice the size, with a packed convolution behind it."""

    def forward(self, input: Tensor) -> Tensor | Lazy:  # type: ignore[override]
        return repeated(input, self.backend)
