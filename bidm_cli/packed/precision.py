"""float16 or bfloat16 for what stays float in a packed network, on GPUs.

    compute_in(model, torch.float16)
    model.denoise(x, t)                     # float32 in and out, as before

Activations, float convolutions and linear layers, and attention take that type. Packed layers keep their
arithmetic (integers, and float32 in the epilogue), and norms their float32 parameters and statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.binary.connections import CrossTimestepConnections
from bidm_cli.packed.load import PackedModel
from bidm_cli.packed.modules import PackedLayer

_KEPT = (PackedLayer, nn.GroupNorm, CrossTimestepConnections)


def compute_in(model: PackedModel, dtype: torch.dtype) -> None:
    """Convert the network's float layers in place; inputs and outputs of the network stay float32.

    Raises:
        ValueError: a type that the kernels do not know, or a model that was converted before.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{dtype}: only float16 and bfloat16")
    if hasattr(model.unet, "computes_in"):
        raise ValueError(f"the network already computes in {model.unet.computes_in}")
    for module in model.unet.modules():
        if not isinstance(module, _KEPT):
            _convert(module, dtype)
    model.unet.computes_in = dtype  # type: ignore[assignment]
    model.unet.register_forward_pre_hook(_Enter(dtype), with_kwargs=True)
    model.unet.register_forward_hook(_leave)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """The module's own tensors, not those of the modules in it."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(dtype))


class _Enter:
    """Pre-hook of the network: converts what is float but the time, which needs all its digits."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, t, *rest = args
        return (self._converted(x), t, *map(self._converted, rest)), {
            name: self._converted(value) for name, value in kwargs.items()
        }

    def _converted(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()
