"""Weights in the precision of their file until the network is first used.

A mapped float16 file takes no memory of its own; converted at once, it would take twice the file's size. What
is only looked at (``bidm inspect``) therefore stays as it is.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def keep_until_used(network: nn.Module) -> nn.Module:
    """Make ``network`` convert itself to float32 when any part of it is first called, or its state dict is
    asked for or set; returns it.

    ``parameters()`` shows the weights as they are, float16 until then. A network that is in float32
    throughout is left alone. To compute in half precision on purpose, call :func:`in_float32` first.
    """
    if all(tensor.dtype == torch.float32 for tensor in _floats(network)):
        return network
    # Every module, as first stages are used through their methods, which call modules inside them.
    for module in network.modules():
        module.register_forward_pre_hook(_before)
        module.register_state_dict_pre_hook(_before)
        module.register_load_state_dict_pre_hook(_before)
    return network


def in_float32(network: Network) -> Network:
    """Convert all of ``network``'s weights to float32 now, in place (same parameter objects); returns it."""
    waiting = [module for module in network.modules() if _before in module._forward_pre_hooks.values()]
    if not waiting:
        return network
    # Weights converted in inference mode could not be trained, nor changed, ever after.
    with torch.inference_mode(False), torch.no_grad():
        network.float()
    for module in waiting:
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _before]:
            hooks.pop(key, None)
    return network


def _floats(network: nn.Module) -> list[torch.Tensor]:
    tensors = (*network.parameters(), *network.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _before(module: nn.Module, *arguments: Any) -> None:
    """Hook before a call, and before the state dict is asked for or set."""
    in_float32(module)
