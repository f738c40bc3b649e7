"""Blocks of a packed network with what lies between the layers moved into them.

:func:`fuse_blocks` turns a network's modules, in place, into classes that compute the same with the same
layers under the same names: those of :mod:`bidm_cli.packed.fused_residual`,
:mod:`bidm_cli.packed.fused_attention` and :mod:`bidm_cli.packed.fused_upsampling`, and those below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bidm_cli.networks import ddpm_unet, lucidrains_unet, openai_blocks, score_unet, w86_unet
from bidm_cli.networks.diffusers import blocks as diffusers_blocks
from bidm_cli.networks.layers import SkipJoin
from bidm_cli.packed.fused_attention import (
    FusedAttention,
    FusedAttentionBlock,
    FusedAttnBlock,
    FusedW86AttnBlock,
)
from bidm_cli.packed.fused_residual import (
    FusedLucidrainsResnetBlock,
    FusedResBlock,
    FusedResnetBlock,
    FusedResnetBlock2D,
    FusedScoreResnetBlock,
    FusedW86ResBlock,
)
from bidm_cli.packed.fused_upsampling import (
    FusedOpenAIUpsample,
    FusedResample,
    FusedScoreUpsample,
    FusedUpsample,
    FusedUpsample2D,
    PackedJoin,
    PackedNearest,
)
from bidm_cli.packed.layers import PackedGroupNorm, PackedLayer

_RESIDUAL: dict[type[nn.Module], tuple[type[nn.Module], Callable[[Any], tuple[nn.Module, ...]]]] = {
    ddpm_unet.ResnetBlock: (FusedResnetBlock, lambda m: (m.conv1, m.conv2)),
    openai_blocks.ResBlock: (FusedResBlock, lambda m: (m.in_layers[-1], m.out_layers[-1])),
    diffusers_blocks.ResnetBlock2D: (FusedResnetBlock2D, lambda m: (m.conv1, m.conv2)),
    w86_unet.ResBlock: (FusedW86ResBlock, lambda m: (m.block1[-1], m.block2[-1])),
    score_unet.ResnetBlock: (FusedScoreResnetBlock, lambda m: (m.Conv_0, m.Conv_1)),
    lucidrains_unet.LucidrainsResnetBlock: (
        FusedLucidrainsResnetBlock,
        lambda m: (m.block1.proj, m.block2.proj),
    ),
}
"""What each residual block becomes if these of its parts are packed."""

_ATTENTION: dict[type[nn.Module], tuple[type[nn.Module], Callable[[Any], tuple[nn.Module, ...]]]] = {
    openai_blocks.AttentionBlock: (FusedAttentionBlock, lambda m: (m.qkv, m.proj_out)),
    ddpm_unet.AttnBlock: (FusedAttnBlock, lambda m: (m.proj_out,)),
    w86_unet.AttnBlock: (FusedW86AttnBlock, lambda m: (m.proj,)),
    diffusers_blocks.Attention: (FusedAttention, lambda m: (m.to_out[0],)),
}
"""The same for attention blocks."""

_UPSAMPLING: dict[type[nn.Module], tuple[type[nn.Module], Callable[[Any], nn.Module | None]]] = {
    ddpm_unet.Upsample: (FusedUpsample, lambda m: m.conv),
    openai_blocks.Upsample: (FusedOpenAIUpsample, lambda m: m.conv),
    diffusers_blocks.Upsample2D: (FusedUpsample2D, lambda m: m.conv),
    w86_unet.Resample: (FusedResample, lambda m: m.main),
    score_unet.Upsample: (FusedScoreUpsample, lambda m: getattr(m, "Conv_0", None)),
}


def fuse_blocks(network: nn.Module) -> None:
    """Fuse the blocks whose convolutions are packed, and give group norms to the backend, in place.

    Skip connections are only described to their blocks where all residual blocks of the network are fused.
    """
    all_fused = True
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            _become(module, PackedGroupNorm)
        elif type(module) in _UPSAMPLING:
            fused, layer = _UPSAMPLING[type(module)]
            if isinstance(layer(module), PackedLayer):
                module.__class__ = fused
        elif type(module) in _ATTENTION:
            attention, layers = _ATTENTION[type(module)]
            if all(isinstance(part, PackedLayer) for part in layers(module)):
                module.__class__ = attention
        elif isinstance(module, nn.Sequential) and len(module) == 2 and _doubles(module[0]):
            if isinstance(module[1], PackedLayer):
                _become(module[0], PackedNearest)
        elif type(module) in _RESIDUAL:
            residual, layers = _RESIDUAL[type(module)]
            if all(isinstance(part, PackedLayer) for part in layers(module)):
                module.__class__ = residual
            else:
                all_fused = False
    for module in network.modules():
        if all_fused and type(module) is SkipJoin:
            _become(module, PackedJoin)


def _doubles(module: nn.Module) -> bool:
    return type(module) is nn.Upsample and module.scale_factor == 2 and module.mode == "nearest"


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
