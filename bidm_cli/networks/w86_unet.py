"""The DDPM U-Net (arXiv 2006.11239) of w86763777/pytorch-ddpm under its own key names.

Against :mod:`bidm_cli.networks.ddpm_unet`: group norms with eps 1e-5, downsamplers padded on all sides,
attention inside the residual block, a table of time embeddings that comes with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bidm_cli.networks.fusion import Features, Prologue, fused_conv
from bidm_cli.networks.layers import (
    Block,
    DenoisingNetwork,
    NetworkInputs,
    SkipJoin,
    conv3x3,
    embedding_layers,
    feature_points,
)
from bidm_cli.networks.unet_blocks import (
    AttnBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    level_inputs,
    residual_layers,
    skip_conv,
)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm as this family has it: 32 groups, eps 1e-5."""
    return nn.GroupNorm(32, channels)


class TimeEmbedding(nn.Module):
    """Row t of a fixed table (interleaved sines and cosines), Linear, SiLU, Linear: [N] -> [N, E]."""

    def __init__(self, timesteps: int, channels: int, embedding: int) -> None:
        super().__init__()
        table = nn.Embedding(timesteps, channels).requires_grad_(False)
        self.timembedding = nn.Sequential(table, *embedding_layers(channels, embedding))

    def forward(self, t: Tensor) -> Tensor:
        return self.timembedding(t.long())


class ResBlock(ResidualBlock):
    """Residual block with the time embedding, and the attention after it where it has one."""

    def __init__(
        self, channels: int, out_channels: int, embedding: int, attention: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        norm1, conv1, projection, norm2, drop, conv2 = residual_layers(
            group_norm, channels, out_channels, embedding, dropout=dropout
        )
        self.block1 = nn.Sequential(norm1, nn.SiLU(), conv1)
        self.temb_proj = nn.Sequential(nn.SiLU(), projection)
        self.block2 = nn.Sequential(norm2, nn.SiLU(), drop, conv2)
        self.shortcut = skip_conv(channels, out_channels)
        self.attn: nn.Module = nn.Identity()
        if attention:
            names = ("group_norm", "proj_q", "proj_k", "proj_v", "proj")
            self.attn = AttnBlock(group_norm(out_channels), names)

    def layers(self) -> Sequence[nn.Module]:
        (norm1, _, conv1), (norm2, _, dropout, conv2) = self.block1, self.block2
        return norm1, conv1, self.temb_proj[1], norm2, dropout, conv2, self.shortcut

    def forward(self, x: Features, embedding: Tensor | None = None) -> Tensor:
        return self.attn(super().forward(x, embedding))


class W86UNet(DenoisingNetwork):
    """The whole network; one entry of ``ch_mult`` per resolution, finest first.

    Args:
        timesteps: rows of the table of time embeddings, T.
        attention_levels: indices into ``ch_mult`` of the resolutions with attention in each block.
    """

    def __init__(
        self,
        *,
        timesteps: int,
        in_channels: int = 3,
        out_channels: int = 3,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = NetworkInputs(in_channels)
        embedding, widths = 4 * ch, [ch * mult for mult in ch_mult]
        self.time_embedding = TimeEmbedding(timesteps, ch, embedding)
        self.head = conv3x3(in_channels, ch, "stem")
        downs: list[nn.Module] = []
        ups: list[nn.Module] = []
        for i, (width, inputs, skipped) in enumerate(
            zip(widths, *level_inputs(ch, widths, [num_res_blocks] * len(widths)), strict=True)
        ):
            attention = i in attention_levels
            downs += [ResBlock(channels, width, embedding, attention, dropout) for channels in inputs]
            blocks = [ResBlock(channels, width, embedding, attention, dropout) for channels in skipped]
            ups = [*blocks, *([Upsample(width, name="main")] if i else []), *ups]
            if i != len(widths) - 1:
                downs.append(Downsample(width, name="main"))
        self.downblocks = nn.ModuleList(downs)
        self.middleblocks = nn.ModuleList(
            ResBlock(widths[-1], widths[-1], embedding, attention, dropout) for attention in (True, False)
        )
        self.upblocks = nn.ModuleList(ups)
        self.join = SkipJoin()
        self.tail = nn.Sequential(group_norm(widths[0]), nn.SiLU(), conv3x3(widths[0], out_channels, "head"))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        embedding = self.time_embedding(t)
        h = self.head(x)
        skips = [h]
        for layer in self.downblocks:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middleblocks:
            h = layer(h, embedding)
        for layer in self.upblocks:
            if isinstance(layer, ResBlock):
                h = self.join(h, skips.pop())
            h = layer(h, embedding)
        norm, _, conv = self.tail
        return fused_conv(conv, h, prologue=Prologue(norm, silu=True))

    def blocks(self) -> list[Block]:
        down, up = self.members("downblocks"), self.members("upblocks")
        return feature_points(["head", *down], ["middleblocks.1"], up)
