"""Activation checkpointing: blocks keep their inputs alone and compute the rest again in the backward pass.

Chen et al., arXiv 1604.06174, by torch.utils.checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bidm_cli.networks.layers import DenoisingNetwork
from bidm_cli.networks.unet_blocks import ResidualBlock


@contextlib.contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """While open, the feature points of ``network`` are computed again when gradients need them.

    A decoder has none; its residual blocks take their place. Hooks of the blocks themselves, which take
    features and blend connections, run once: they stand outside. A block with a hook inside is left as it is.
    Nothing is random in training, so the result is the same.
    """
    blocks = _recomputable(network)
    for block in blocks:
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputable(network: nn.Module) -> list[nn.Module]:
    """Blocks with no hook below them, the outermost where one holds another."""
    chosen: dict[str, nn.Module] = {}
    if isinstance(network, DenoisingNetwork):
        names = [point.name for point in network.blocks()]
    else:
        names = [name for name, module in network.named_modules() if isinstance(module, ResidualBlock)]
    for name in sorted(names):
        block = network.get_submodule(name)
        below = [module for module in block.modules() if module is not block]
        if any(module._forward_hooks for module in below) or any(name.startswith(f"{o}.") for o in chosen):
            continue
        chosen[name] = block
    return list(chosen.values())
