"""The sign that is never zero, and its two training-time gradients.

    >>> sign(torch.tensor([-0.5, 0.0, 0.5]))
    tensor([-1.,  1.,  1.])

Everything in bidm that turns numbers into bits goes through here: sign(0) = +1 and bit 1 means +1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1 (NaN gives -1), in the dtype of x. Not differentiable."""
    x = x.detach()
    # Comparing straight into floats takes a quarter of the time of a bool tensor and its conversion.
    return torch.ge(x, 0, out=torch.empty_like(x)).mul_(2).sub_(1)


class _ClipSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.abs().le_(1).mul_(gradients[0])


class _ApproxSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.abs().mul_(-2).add_(2).clamp_(min=0).mul_(gradients[0])


def sign_weight(w: Tensor) -> Tensor:
    """Sign of latent weights, with the clipped straight-through estimator.

        forward   sign(w)
        backward  d sign/dw = 1 where |w| <= 1, else 0

    Source: BinaryConnect / Binarized Neural Networks (arXiv 1602.02830), as XNOR-Net (arXiv 1603.05279) and
    BiDM (arXiv 2412.05926) use it. Any shape.
    """
    return _ClipSTE.apply(w)


def sign_activation(x: Tensor) -> Tensor:
    """Sign of activations, with the derivative of a piecewise quadratic in place of the step's.

        forward   sign(x)
        backward  d sign/dx = 2 + 2x on [-1, 0), 2 - 2x on [0, 1), else 0

    Source: Bi-Real Net (arXiv 1808.00278), eq. 7. Any shape.
    """
    return _ApproxSign.apply(x)
