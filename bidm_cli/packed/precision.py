"""float16 or bfloat16 for the float part of a packed network.

On the cupy backend activations, float convolutions and linear layers, and attention take that type. Inputs
and outputs of the network stay float32, as do the epilogue of packed layers, and the parameters and
statistics of group norms. On the numba backend bfloat16 is for the products of attention alone, where the
processor has a matrix unit for it.

float32 is the default: rounding before a binary layer may flip a sign, and each flip moves the layers after
it. In float32 only values next to a threshold differ from a CPU's; in half precision a packed file gives
other images than the ones it was tested with.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from bidm_cli.binary.connections import CrossTimestepConnections
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.packed.layers import PackedAttention, PackedBinaryAttention, PackedLayer
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.uses import Products

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types by ``precision``."""

_KEPT = (PackedLayer, nn.GroupNorm, CrossTimestepConnections)
_STRICT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm)
"""Modules that need an input of their weights' type."""


def use_precision(model: DiffusionModel, name: str | None) -> None:
    """Apply ``precision``; None is the file's own, which its recipe's ``attention.products`` says.

    Raises:
        BidmError: another type than float32 for an original, or one that its backend does not have.
    """
    if name is None:
        return
    if isinstance(model, PackedModel) and model.backend == "numba" and name != "float16":
        for module in _attentions(model):
            module.products = cast(Products, name)
        model.recorded.clear()
        return
    if DTYPES[name] == torch.float32:
        return
    if not isinstance(model, PackedModel):
        raise BidmError(f"`precision` {name} is for packed files; leave it out for an original checkpoint")
    if model.backend != "cupy":
        raise BidmError(
            f"`precision` {name} is for the cupy backend, and this model runs on {model.backend}; "
            "leave it out, or use a CUDA device (bidm doctor says what is missing)"
        )
    compute_in(model, DTYPES[name])


def precision_of(model: DiffusionModel) -> tuple[str, str]:
    """(precision of a model's float part, as ``precision`` takes it; why it is not the one asked for)."""
    if not isinstance(model, PackedModel):
        return "float32", ""
    dtype = getattr(model.unet, "computes_in", torch.float32)
    asked = any(module.products == "bfloat16" for module in _attentions(model))
    if dtype != torch.float32 or not asked:
        return str(dtype).removeprefix("torch."), ""
    if model.backend != "numba":
        return "float32", f"the backend {model.backend} computes attention in float32"
    from bidm_cli.packed.cpu.ops.attention import has_bfloat16

    if has_bfloat16():
        return "bfloat16", ""
    return "float32", "this processor has no matrix unit for bfloat16"


def _attentions(model: PackedModel) -> list[PackedAttention]:
    """Attentions of the network with float products."""
    modules = model.unet.modules()
    return [m for m in modules if isinstance(m, PackedAttention) and not isinstance(m, PackedBinaryAttention)]


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
    model.recorded.clear()
    model.unet.computes_in = dtype  # type: ignore[assignment]
    model.unet.register_forward_pre_hook(functools.partial(_enter, dtype), with_kwargs=True)
    model.unet.register_forward_hook(_leave)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """The module's own tensors, not those of the modules in it."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(dtype))
    if isinstance(module, _STRICT) and module.weight is not None:
        module.register_forward_pre_hook(_to_weights)


def _to_weights(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Pre-hook: embeddings of the time are float32 whatever the network computes in."""
    x, *rest = args
    return (x.to(module.weight.dtype), *rest)  # type: ignore[arg-type]


def _enter(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the network: converts all floats but the time, which needs all its digits."""

    def converted(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    x, t, *rest = args
    return (converted(x), t, *map(converted, rest)), {key: converted(value) for key, value in kwargs.items()}


def _leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()
