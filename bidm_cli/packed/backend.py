"""Backend protocol: packed layers, attention, norms and connections on one kind of device.

A packed layer and the operations around it are

    y = D . K . alpha + bias + |s| P(I) + offset + residual,      I = prologue(x)

with integers D that are exact on every backend for the same signs, and floats that agree to rounding.
:mod:`bidm_cli.packed.backends.torch` is the reference.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from bidm_cli.networks.fusion import NOTHING, Features, Fused, Prologue
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.tensors import LayerTensors
from bidm_cli.packed.uses import Products


class Backend(Protocol):
    """Runs packed layers. A backend that compiles at first use may have a ``warm_up(uses, say)`` that does so
    now for the uses of a network's modules, or with None for all.

    Attributes:
        name: as ``backend`` takes it.
        channels_last: True if convolutions read and return tensors with the channels last.
        reads_virtual: True if :meth:`run` reads concatenations and upsampled pixels in place, without a copy.
    """

    name: str
    channels_last: bool
    reads_virtual: bool

    def fuses(self, prologue: Prologue | None) -> bool:
        """True if :meth:`run` and :meth:`normalize` can do this prologue."""

    def run(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        """A whole layer on x float32 [N, C, H, W] (or a virtual concat), [N, C, L] or [..., C], by its kind.

        Prologue and offset belong to convolutions, upsampling to 2-d ones; a residual has the result's shape.
        """

    def signs(self, layer: LayerTensors, x: Features, fused: Fused = NOTHING) -> Tensor:
        """Signs of a layer's activations as :meth:`run` takes them, bool (True is +1), in the shape of I.

        A layer of several activation planes gives [planes, ...].
        """

    def normalize(self, x: Tensor, prologue: Prologue) -> Tensor:
        """Apply a prologue to x [N, C, ...], without a layer after it."""

    def convolves(self, conv: nn.Conv2d) -> bool:
        """True if :meth:`convolve` has a kernel for a float convolution of this shape."""

    def convolve(self, conv: nn.Conv2d, x: Tensor, fused: Fused = NOTHING) -> Tensor:
        """A float convolution on x [N, C, H, W] with what is around it; agrees to rounding."""

    def blend(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        """A connection: (1 - beta) new + beta old, for features [N, ...] of the same shape and betas [N].

        The result may be ``old`` itself while a step is captured (:mod:`bidm_cli.packed.recording.denoiser`).
        """

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, products: Products = "float32"
    ) -> Tensor:
        """softmax(q k^T scale) v in floats; shapes as :class:`bidm_cli.networks.layers.AttentionProduct`.

        ``products``: least precision of the factors of both products.
        """

    def binary_attention(
        self, q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
    ) -> Tensor:
        """:func:`bidm_cli.binary.attention.binary_attention` of signs; score_scale [heads] or [1]."""

    def kernel(self, geometry: LayerGeometry) -> str:
        """Name of the kernel for a layer of this shape, for ``bidm doctor`` and ``bidm sample``."""
