"""Binarizers by name: the sign that is never zero (sign(0) = +1, bit 1 means +1), with a gradient.

    @register_binarizer("tanh")                     # then, in a recipe: binarize: {binarizer: tanh}
    def sign_tanh(w: Tensor) -> Tensor:
        return with_derivative(w, lambda w: 1 - w.tanh() ** 2)

Binarizers differ in their gradients alone, as packed files hold the signs of the latent weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bidm_cli.errors import BidmError

Binarizer = Callable[[Tensor], Tensor]
"""Function of a tensor to its signs, +1 or -1, in the same shape and dtype; differentiable."""

_BINARIZERS: dict[str, Binarizer] = {}


def register_binarizer(name: str) -> Callable[[Binarizer], Binarizer]:
    """Register a binarizer of latent weights under the name that recipes use (``binarize.binarizer``).

    Raises:
        ValueError: the name is taken.
    """

    def register(binarizer: Binarizer) -> Binarizer:
        if name in _BINARIZERS:
            raise ValueError(f"there is a binarizer {name!r} already")
        _BINARIZERS[name] = binarizer
        return binarizer

    return register


def binarizer_of(name: str) -> Binarizer:
    """Return a registered binarizer.

    Raises:
        BidmError: none has this name.
    """
    if name not in _BINARIZERS:
        raise BidmError(f"unknown binarizer {name!r}; there are {', '.join(_BINARIZERS)}")
    return _BINARIZERS[name]


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1 (NaN gives -1), in the dtype of x. Not differentiable."""
    x = x.detach()
    # Comparing straight into floats takes a quarter of the time of a bool tensor and its conversion.
    return torch.ge(x, 0, out=torch.empty_like(x)).mul_(2).sub_(1)


class _SurrogateGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.derivative = derivative
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.derivative(x).mul_(gradients[0]), None


def with_derivative(x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
    """Sign of x with ``derivative(x)``, a new tensor in the shape of x, in place of the step's derivative."""
    return _SurrogateGradient.apply(x, derivative)


@register_binarizer("clipped_ste")
def sign_weight(w: Tensor) -> Tensor:
    """Sign of latent weights, clipped straight-through estimator: d sign/dw = 1 where |w| <= 1, else 0.

    Source: BinaryConnect / Binarized Neural Networks (arXiv 1602.02830), as XNOR-Net (arXiv 1603.05279) and
    BiDM (arXiv 2412.05926) use it. Any shape.
    """
    return with_derivative(w, lambda w: w.abs().le_(1))


@register_binarizer("quadratic")
def sign_activation(x: Tensor) -> Tensor:
    """Sign of activations, piecewise quadratic: d sign/dx = 2 + 2x on [-1, 0), 2 - 2x on [0, 1), else 0.

    Source: Bi-Real Net (arXiv 1808.00278), eq. 7. Any shape.
    """
    return with_derivative(x, lambda x: x.abs().mul_(-2).add_(2).clamp_(min=0))
