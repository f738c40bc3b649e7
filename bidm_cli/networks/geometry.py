"""Geometry of a convolution or linear layer: channels, kernel, stride and padding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import AsymmetricConv2d


@dataclass(frozen=True)
class LayerGeometry:
    """Shape of a convolution or linear layer.

    Attributes:
        kind: "conv2d", "conv1d" or "linear". A Conv1d has kernel (1, k) and pads (left, right, 0, 0);
            a Linear has kernel (1, 1) and acts on the last axis.
        kernel: (kh, kw).
        stride: (sh, sw).
        padding: zeros at the (left, right, top, bottom), as in ``F.pad``.
    """

    kind: Literal["conv2d", "conv1d", "linear"]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def taps(self) -> int:
        """Kernel positions, kh * kw."""
        return self.kernel[0] * self.kernel[1]

    @property
    def fan_in(self) -> int:
        """Bits of one filter, C * kh * kw."""
        return self.in_channels * self.taps

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') of a convolution's output for an H x W input."""
        left, right, top, bottom = self.padding
        return (
            (height + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (width + left + right - self.kernel[1]) // self.stride[1] + 1,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerGeometry:
        """Read back :meth:`to_json`; lists become tuples."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)

    @classmethod
    def of(cls, layer: nn.Module, name: str = "layer") -> LayerGeometry:
        """Geometry of an nn.Conv2d, nn.Conv1d or nn.Linear.

        Raises:
            BidmError: groups, dilation, non-zero padding modes, or another kind of layer.
        """
        if isinstance(layer, nn.Linear):
            return cls("linear", layer.in_features, layer.out_features)
        if not isinstance(layer, (nn.Conv2d, nn.Conv1d)):
            raise BidmError(f"{name}: a {type(layer).__name__} cannot be made binary; keep it float")
        if layer.groups != 1 or any(d != 1 for d in layer.dilation) or layer.padding_mode != "zeros":
            raise BidmError(
                f"{name}: groups, dilation and padding modes other than zeros cannot be made binary; "
                "add a rule that keeps this layer float"
            )
        kernel: Any = tuple(layer.kernel_size)
        stride: Any = tuple(layer.stride)
        padding = _padding_of(layer, name)
        if isinstance(layer, nn.Conv1d):
            return cls("conv1d", layer.in_channels, layer.out_channels, (1, *kernel), (1, *stride), padding)
        return cls("conv2d", layer.in_channels, layer.out_channels, kernel, stride, padding)


def _padding_of(layer: nn.Conv2d | nn.Conv1d, name: str) -> tuple[int, int, int, int]:
    if isinstance(layer, AsymmetricConv2d):
        return layer.sides
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return (0, 0, 0, 0)
        raise BidmError(f"{name}: padding {layer.padding!r} cannot be made binary; keep this layer float")
    if isinstance(layer, nn.Conv1d):
        (side,) = layer.padding
        return (side, side, 0, 0)
    vertical, horizontal = layer.padding
    return (horizontal, horizontal, vertical, vertical)
