"""Arithmetic of a binary layer, shared by training and by the packed reference so that both round alike.

    y = D . K . alpha + bias + |s| P(I)        D = sign(I + tau) conv sign(W)

D holds integers, which float32 represents exactly; every later operation is one torch call in this order.
With more activation planes D = D_1 + g_1 D_2 + ..., each D_i of integers (:mod:`bidm_cli.binary.planes`).
Layout: convolutions [N, C, H, W] (a Conv1d has H = 1), linear layers [..., C].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.binary.planes import plane_sum
from bidm_cli.networks.geometry import LayerGeometry


def convolve(x: Tensor, weight: Tensor, geometry: LayerGeometry) -> Tensor:
    """Convolution with the layer's stride and zero padding (or x W^T for a linear layer), without bias.

    x [N, C, H, W] and weight [O, C, kh, kw], or x [..., C] and weight [O, C].
    """
    if geometry.kind == "linear":
        return F.linear(x, weight)
    left, right, top, bottom = geometry.padding
    if left == right and top == bottom:
        return F.conv2d(x, weight, stride=geometry.stride, padding=(top, left))
    return F.conv2d(F.pad(x, geometry.padding), weight, stride=geometry.stride)


def activation_scale(x: Tensor, scale_filter: Tensor, geometry: LayerGeometry) -> Tensor:
    """K = A * k with A the mean of |I| over channels (XNOR-Net, sec. 3.2; k learnable: BiDM, eq. 7).

    Gives [N, 1, H', W'], or [..., 1] for a linear layer; scale_filter is [kh, kw].
    """
    if geometry.kind == "linear":
        return x.abs().mean(dim=-1, keepdim=True) * scale_filter.reshape(())
    magnitude = x.abs().mean(dim=1, keepdim=True)
    if geometry.taps == 1 and geometry.stride == (1, 1) and not any(geometry.padding):
        return magnitude * scale_filter.reshape(())
    return convolve(magnitude, scale_filter[None, None], geometry)


def tile_channels(x: Tensor, out_channels: int, dim: int = 1) -> Tensor:
    """Change the number of channels without parameters: repeat them, or average those equal mod O.

    out[o] = x[o mod C] where O >= C, else the mean of x[c] over all c = o (mod O).
    """
    channels = x.shape[dim]
    if channels == out_channels:
        return x
    if out_channels > channels:
        whole, rest = divmod(out_channels, channels)
        return torch.cat([x] * whole + ([x.narrow(dim, 0, rest)] if rest else []), dim=dim)
    whole, rest = divmod(channels, out_channels)
    total = x.narrow(dim, 0, out_channels)
    for i in range(1, whole):
        total = total + x.narrow(dim, i * out_channels, out_channels)
    if not rest:
        return total / whole
    longer = (total.narrow(dim, 0, rest) + x.narrow(dim, whole * out_channels, rest)) / (whole + 1)
    shorter = total.narrow(dim, rest, out_channels - rest) / whole
    return torch.cat([longer, shorter], dim=dim)


def resize_to(x: Tensor, geometry: LayerGeometry, size: tuple[int, int]) -> Tensor:
    """Bring [N, C, H, W] to the output's size: average stride cells, or repeat pixels if it is larger."""
    if geometry.stride != (1, 1):
        x = F.avg_pool2d(x, geometry.stride, ceil_mode=True, count_include_pad=False)
    if size[0] > x.shape[-2] or size[1] > x.shape[-1]:
        return F.interpolate(x, size=size, mode="nearest")
    return x[..., : size[0], : size[1]]


def shortcut(x: Tensor, geometry: LayerGeometry, size: tuple[int, int], weight: Tensor | None) -> Tensor:
    """P(I): the input in the output's shape. ``weight`` [O, C, 1, 1] makes it a float 1x1 convolution."""
    if geometry.kind == "linear":
        if weight is not None:
            return F.linear(x, weight[:, :, 0, 0])
        return tile_channels(x, geometry.out_channels, dim=-1)
    x = resize_to(x, geometry, size)
    return F.conv2d(x, weight) if weight is not None else tile_channels(x, geometry.out_channels)


def epilogue(
    dot: Tensor,
    scale_map: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    shortcut_scale: Tensor | None,
    shortcut_value: Tensor | None,
    geometry: LayerGeometry,
) -> Tensor:
    """dot . K . alpha + bias + |s| P, in this order; absent parts drop out. alpha and bias are [O]."""

    def per_channel(values: Tensor) -> Tensor:
        return values if geometry.kind == "linear" else values[:, None, None]

    y = dot
    if scale_map is not None:
        y = y * scale_map
    if weight_scale is not None:
        y = y * per_channel(weight_scale)
    if bias is not None:
        y = y + per_channel(bias)
    if shortcut_scale is not None and shortcut_value is not None:
        y = y + shortcut_scale.abs() * shortcut_value
    return y


def forward(
    x: Tensor,
    planes: Sequence[Tensor],
    weight: Tensor,
    geometry: LayerGeometry,
    *,
    plane_scale: Tensor | None = None,
    scale_filter: Tensor | None = None,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    shortcut_scale: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    binary_share: float = 1.0,
) -> Tensor:
    """Forward pass of a binary layer.

    Args:
        planes: sign(I + tau) and further planes with their ``plane_scale``, or I itself for 1-bit weights
            only.
        weight: sign(W).
        binary_share: l of progressive training, which mixes K with 1: l K + (1 - l).
    """
    dot = plane_sum([convolve(plane, weight, geometry) for plane in planes], plane_scale)
    scale_map = None if scale_filter is None else activation_scale(x, scale_filter, geometry)
    if scale_map is not None and binary_share < 1:
        scale_map = binary_share * scale_map + (1 - binary_share)
    value = None
    if shortcut_scale is not None:
        size = (int(dot.shape[-2]), int(dot.shape[-1])) if geometry.kind != "linear" else (1, 1)
        value = shortcut(x, geometry, size, shortcut_weight)
    return epilogue(dot, scale_map, weight_scale, bias, shortcut_scale, value, geometry)
