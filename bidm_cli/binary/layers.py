"""Trainable binary layer: drop-in replacement for Conv2d, Conv1d and Linear.

    layer = BinaryLayer.from_float(nn.Conv2d(64, 64, 3, padding=1), BinarySpec())

Latent weights stay in float and start from the teacher's; the layer computes with their signs. The formula is
in :mod:`bidm_cli.binary.functional`, the gradients in :mod:`bidm_cli.binary.sign`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.binary import functional
from bidm_cli.binary.layer_parts import part_shapes
from bidm_cli.binary.planes import (
    gradient_share,
    initial_offsets,
    initial_scales,
    plane_sum,
    scaled_gradient,
    sign_planes,
)
from bidm_cli.binary.sign import binarizer_of, sign_activation
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import role_of
from bidm_cli.recipe.spec import BinarySpec


class BinaryLayer(nn.Module):
    """Binary Conv2d, Conv1d or Linear, by its geometry's kind.

    Attributes:
        weight: latent float weights, in the original layer's shape.
        bias: the teacher's bias [O], kept in float, or None.
        threshold: tau [C] of sign(I + tau), starts at 0, or None.
        plane_offset, plane_scale: delta [planes - 1, C] and g [planes - 1] of further planes, or None.
        scale_filter: k [kh, kw] of K = A * k, starts at 1/(kh kw); a buffer when fixed, or None.
        shortcut_scale: s [] of |s| P(I), or None.
        shortcut_weight: [O, C, 1, 1] of a float shortcut conv, starts as channel tiling, or None.
        binary_share: l of progressive training: the layer sees l b + (1 - l) I for its binary activation b;
            below 1 only while training.
    """

    threshold: Tensor | None
    plane_offset: Tensor | None
    plane_scale: Tensor | None
    scale_filter: Tensor | None
    shortcut_scale: Tensor | None
    shortcut_weight: Tensor | None

    def __init__(
        self, geometry: LayerGeometry, spec: BinarySpec, weight: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.geometry, self.spec = geometry, spec
        self.binarizer, self.binary_share = binarizer_of(spec.binarizer), 1.0
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        initial: dict[str, Callable[[], Tensor]] = {
            "threshold": lambda: torch.zeros(geometry.in_channels, **like),
            "plane_offset": lambda: initial_offsets(spec.planes, geometry.in_channels, **like),
            "plane_scale": lambda: initial_scales(spec.planes, **like),
            "scale_filter": lambda: torch.full(geometry.kernel, 1.0 / geometry.taps, **like),
            "shortcut_scale": lambda: torch.tensor(spec.shortcut_init, **like),
            "shortcut_weight": lambda: _tiling(geometry, like),
        }
        present = part_shapes(geometry, spec, bias is not None)
        for name, make in initial.items():
            if name == "scale_filter" and spec.activation_scale == "fixed" and name in present:
                self.register_buffer(name, make())
            else:
                self.register_parameter(name, nn.Parameter(make()) if name in present else None)

    @classmethod
    def from_float(cls, layer: nn.Module, spec: BinarySpec, name: str = "layer") -> BinaryLayer:
        """Make the binary layer that starts from a float layer's weights.

        Raises:
            BidmError: a layer that cannot be made binary (groups, dilation, another kind).
        """
        geometry = LayerGeometry.of(layer, name)
        binary = cls(geometry, spec, layer.weight, layer.bias)  # type: ignore[arg-type]
        binary.role = role_of(layer)  # type: ignore[assignment]
        return binary

    def weight_scale(self) -> Tensor | None:
        """alpha [O] = mean |W_o| (one value repeated for "layer"), outside the graph; None for "none"."""
        if self.spec.weight_scale == "none":
            return None
        magnitude = self.weight.detach().abs()
        if self.spec.weight_scale == "layer":
            return magnitude.mean().expand(self.geometry.out_channels)
        return magnitude.flatten(1).mean(dim=1)

    def _lifted(self, x: Tensor) -> Tensor:
        """Weights and inputs of a Conv1d get an axis of height 1; others stay as they are."""
        return x.unsqueeze(2) if self.geometry.kind == "conv1d" else x

    def _planes(self, x: Tensor) -> list[Tensor]:
        """Activation planes of x, or one tensor in their place, for :func:`functional.forward`."""
        if self.spec.activations == "float":
            return [x]
        shape = (-1,) if self.geometry.kind == "linear" else (-1, 1, 1)
        z = x if self.threshold is None else x + self.threshold.reshape(shape)
        offsets = () if self.plane_offset is None else [row.reshape(shape) for row in self.plane_offset]
        planes = sign_planes(z, offsets, sign_activation)
        if not torch.is_grad_enabled() and self.binary_share == 1:
            return planes
        # One convolution instead of one per plane; the same but for the rounding of float sums.
        activation = plane_sum(planes, self.plane_scale)
        if self.plane_scale is not None:
            activation = scaled_gradient(activation, gradient_share(self.plane_scale))
        if self.binary_share < 1:
            activation = self.binary_share * activation + (1 - self.binary_share) * x
        return [activation]

    def forward(self, x: Tensor) -> Tensor:
        x = self._lifted(x)
        planes = self._planes(x)
        y = functional.forward(
            x,
            planes,
            self._lifted(self.binarizer(self.weight)),
            self.geometry,
            plane_scale=self.plane_scale if len(planes) > 1 else None,
            binary_share=self.binary_share,
            scale_filter=self.scale_filter,
            weight_scale=self.weight_scale(),
            bias=self.bias,
            shortcut_scale=self.shortcut_scale,
            shortcut_weight=self.shortcut_weight,
        )
        return y.squeeze(2) if self.geometry.kind == "conv1d" else y

    def extra_repr(self) -> str:
        return f"{self.geometry.kind}, {self.geometry.in_channels}, {self.geometry.out_channels}, {self.spec}"


def _tiling(geometry: LayerGeometry, like: dict[str, Any]) -> Tensor:
    """Channel tiling as the weight of a 1x1 convolution, [O, C, 1, 1]."""
    tiled = functional.tile_channels(torch.eye(geometry.in_channels, **like), geometry.out_channels)
    return tiled.T[:, :, None, None].contiguous()
