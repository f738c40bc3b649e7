"""Weights as 8- or 6-bit integers with scales, and floats in the type of the file.

Rounding is to nearest and symmetric: w is about q s, with s the largest |w| of a group over 127 (31), itself
rounded to float16 first, so that q fits the s that is stored (float32 scales gave 52.87 dB on the bundled
faces, these 52.88). int8 has a group per output channel, int6 one per 64 inputs of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.errors import BidmError

GROUP = 64
"""Inputs of an output channel that share a scale of int6."""
_LARGEST = {"int8": 127, "int6": 31}


def to_storage(tensor: Tensor, float_type: torch.dtype, name: str = "tensor") -> Tensor:
    """The tensor for the file: floats in ``float_type``, float32 where that would overflow.

    Raises:
        BidmError: infinities or NaN.
    """
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    if not bool(tensor.isfinite().all()):
        raise BidmError(f"{name} holds infinities or NaN: training diverged; lower the learning rate")
    rounded = tensor.to(float_type)
    return rounded if bool(rounded.isfinite().all()) else tensor.float()


def quantize(weight: Tensor, kind: str, name: str = "tensor") -> tuple[Tensor, Tensor]:
    """(integers, scales) of a weight [O, ...]; shapes as :func:`stored_shapes` gives them.

    Args:
        kind: "int8" or "int6".

    Raises:
        BidmError: infinities or NaN.
    """
    rows = _grouped(weight.detach().cpu().float().flatten(1), kind)
    scale = to_storage(rows.abs().amax(dim=-1) / _LARGEST[kind], torch.float16, name)
    divisor = torch.where(scale > 0, scale, 1).float()[..., None]
    values = (rows / divisor).round().clamp(-_LARGEST[kind], _LARGEST[kind]).to(torch.int8)
    if kind == "int8":
        return values.reshape(weight.shape), scale[:, 0]
    return _pack_sixes(values.flatten(1)[:, : math.prod(weight.shape[1:])]), scale


def dequantize(values: Tensor, scale: Tensor, kind: str, shape: Sequence[int]) -> Tensor:
    """float32 weight of a shape from what :func:`quantize` gives."""
    count = math.prod(shape[1:])
    integers = values.flatten(1) if kind == "int8" else _unpack_sixes(values)[:, :count]
    if kind == "int8":
        scale = scale[:, None]
    rows = _grouped(integers.float(), kind) * scale.float()[..., None]
    return rows.flatten(1)[:, :count].reshape(tuple(shape))


def stored_shapes(shape: Sequence[int], kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the integers (int8 as the weight, or uint8 [O, bytes]) and the scales ([O], [O, groups])."""
    if kind == "int8":
        return tuple(shape), (shape[0],)
    count = math.prod(shape[1:])
    return (shape[0], 3 * math.ceil(count / 4)), (shape[0], math.ceil(count / GROUP))


def _grouped(rows: Tensor, kind: str) -> Tensor:
    """[O, n] as [O, groups, size], filled up with zeros."""
    if kind == "int8":
        return rows[:, None]
    return F.pad(rows, (0, -rows.shape[1] % GROUP)).reshape(len(rows), -1, GROUP)


def _pack_sixes(values: Tensor) -> Tensor:
    """int8 [O, n] to uint8 [O, 3 ceil(n / 4)]: four values in two's complement in 24 bits, little-endian."""
    fours = F.pad(values.int() & 63, (0, -values.shape[1] % 4)).reshape(len(values), -1, 4)
    joined = (fours << torch.tensor([0, 6, 12, 18], dtype=torch.int32)).sum(dim=-1, dtype=torch.int32)
    return ((joined[..., None] >> torch.tensor([0, 8, 16])) & 255).to(torch.uint8).flatten(1)


def _unpack_sixes(packed: Tensor) -> Tensor:
    """uint8 [O, 3 m] to int8 [O, 4 m]."""
    threes = packed.reshape(len(packed), -1, 3).int()
    joined = (threes << torch.tensor([0, 8, 16], dtype=torch.int32)).sum(dim=-1, dtype=torch.int32)
    fours = (joined[..., None] >> torch.tensor([0, 6, 12, 18], dtype=torch.int32)) & 63
    return torch.where(fours > 31, fours - 64, fours).to(torch.int8).flatten(1)
