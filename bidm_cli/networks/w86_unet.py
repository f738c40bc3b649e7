"""The DDPM U-Net (arXiv 2006.11239) of w86763777/pytorch-ddpm under its own key names.

Against :mod:`bidm_cli.networks.ddpm_unet`: group norms with eps 1e-5, downsamplers padded on all sides,
attention inside the residual block, a table of time embeddings that comes with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bidm_cli.networks.fusion import Features, Prologue, fused_conv, read_in_place, shortcut
from bidm_cli.networks.layers import (
    AttentionProduct,
    Block,
    DenoisingNetwork,
    NetworkInputs,
    SkipJoin,
    attend_positions,
    with_role,
)


class TimeEmbedding(nn.Module):
    """Row t of a fixed table (interleaved sines and cosines), Linear, SiLU, Linear: [N] -> [N, E]."""

    def __init__(self, timesteps: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.timembedding = nn.Sequential(
            nn.Embedding(timesteps, channels),
            with_role(nn.Linear(channels, embedding), "time_embedding"),
            nn.SiLU(),
            with_role(nn.Linear(embedding, embedding), "time_embedding"),
        )
        self.timembedding[0].weight.requires_grad_(False)

    def forward(self, t: Tensor) -> Tensor:
        return self.timembedding(t.long())


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions, with a residual: [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels)
        self.proj_q = with_role(nn.Conv2d(channels, channels, 1), "attention_qkv")
        self.proj_k = with_role(nn.Conv2d(channels, channels, 1), "attention_qkv")
        self.proj_v = with_role(nn.Conv2d(channels, channels, 1), "attention_qkv")
        self.proj = with_role(nn.Conv2d(channels, channels, 1), "attention_out")
        self.product = AttentionProduct()

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        attended = attend_positions(h, self.proj_q, self.proj_k, self.proj_v, self.product)
        return fused_conv(self.proj, attended, residual=x)


class ResBlock(nn.Module):
    """Two 3x3 convs with the time embedding in between, shortcut, attention: [N, C, H, W] -> [N, O, H, W]."""

    def __init__(
        self, channels: int, out_channels: int, embedding: int, attention: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        first = with_role(nn.Conv2d(channels, out_channels, 3, padding=1), "conv")
        second = with_role(nn.Conv2d(out_channels, out_channels, 3, padding=1), "conv")
        projection = with_role(nn.Linear(embedding, out_channels), "time_projection")
        self.block1 = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), first)
        self.temb_proj = nn.Sequential(nn.SiLU(), projection)
        self.block2 = nn.Sequential(nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Dropout(dropout), second)
        self.shortcut: nn.Module = nn.Identity()
        if channels != out_channels:
            self.shortcut = with_role(nn.Conv2d(channels, out_channels, 1), "skip")
        self.attn: nn.Module = AttnBlock(out_channels) if attention else nn.Identity()

    def forward(self, x: Features, embedding: Tensor) -> Tensor:
        (norm1, _, conv1), (norm2, _, dropout, conv2) = self.block1, self.block2
        x = read_in_place(conv1, x)
        offset = self.temb_proj(embedding)
        h = fused_conv(conv1, x, prologue=Prologue(norm1, silu=True), offset=offset)
        between = Prologue(norm2, silu=True, dropout=dropout)
        return self.attn(fused_conv(conv2, h, prologue=between, residual=shortcut(self.shortcut, x)))


class Resample(nn.Module):
    """Halve H and W by a 3x3 stride-2 conv, or double them by nearest neighbour and a 3x3 conv."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.main = with_role(nn.Conv2d(channels, channels, 3, 1 if up else 2, padding=1), "resample")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return fused_conv(self.main, x, upsample=2 if self.up else 1)


class W86UNet(DenoisingNetwork):
    """The whole network; one entry of ``ch_mult`` a resolution, finest first.

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
        embedding, width, skips = 4 * ch, ch, [ch]
        self.time_embedding = TimeEmbedding(timesteps, ch, embedding)
        self.head = with_role(nn.Conv2d(in_channels, ch, 3, padding=1), "stem")
        self.downblocks = nn.ModuleList()
        for i, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                block = ResBlock(width, ch * mult, embedding, i in attention_levels, dropout)
                self.downblocks.append(block)
                width = ch * mult
                skips.append(width)
            if i != len(ch_mult) - 1:
                self.downblocks.append(Resample(width, up=False))
                skips.append(width)
        self.middleblocks = nn.ModuleList(
            ResBlock(width, width, embedding, attention, dropout) for attention in (True, False)
        )
        self.upblocks = nn.ModuleList()
        for i in reversed(range(len(ch_mult))):
            out = ch * ch_mult[i]
            for _ in range(num_res_blocks + 1):
                block = ResBlock(width + skips.pop(), out, embedding, i in attention_levels, dropout)
                self.upblocks.append(block)
                width = out
            if i != 0:
                self.upblocks.append(Resample(width, up=True))
        self.join = SkipJoin()
        self.tail = nn.Sequential(
            nn.GroupNorm(32, width),
            nn.SiLU(),
            with_role(nn.Conv2d(width, out_channels, 3, padding=1), "head"),
        )

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
        return self.tail(h)

    def blocks(self) -> list[Block]:
        found = [Block("head", "encoder")]
        found += [Block(f"downblocks.{i}", "encoder") for i in range(len(self.downblocks))]
        found.append(Block("middleblocks.1", "middle"))
        return found + [Block(f"upblocks.{i}", "decoder") for i in range(len(self.upblocks))]
