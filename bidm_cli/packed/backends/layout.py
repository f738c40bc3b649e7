"""Layout of a layer's input and output for kernels that count in integers: [N, H, W, C], contiguous.

A linear layer is a 1x1 convolution over one long line of pixels, a 1-d convolution has images of height 1.
"""

from __future__ import annotations

from torch import Tensor

from bidm_cli.networks.fusion import Features


def channels_last(x: Tensor, kind: str) -> Tensor:
    """Contiguous [N, H, W, C] of a layer's input or output; a view where the layout allows it."""
    if kind == "linear":
        return x.contiguous().reshape(1, 1, -1, x.shape[-1])
    if kind == "conv1d":
        return x.transpose(1, 2).contiguous()[:, None]
    return x.permute(0, 2, 3, 1).contiguous()


def restore_layout(y: Tensor, kind: str, x: Features) -> Tensor:
    """The reverse, for a result y [N, H, W, O] of the layer's input ``x``."""
    if kind == "linear":
        assert isinstance(x, Tensor)
        return y.reshape(*x.shape[:-1], -1)
    return y.permute(0, 3, 1, 2) if kind == "conv2d" else y[:, 0].transpose(1, 2)
