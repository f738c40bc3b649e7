"""The op set: what a backend has to do, once, in words. :mod:`bidm_cli.packed.reference` says it in torch.

A backend runs packed layers on one kind of device. The three small operations are exact: words and integers
are the same bits on every backend. :meth:`Backend.run` is a whole layer,

    y = D . K . alpha + bias + |s| P(I)

whose integers D are exact and whose floats agree to rounding. Words are as :mod:`bidm_cli.packed.bits` lays
them out; activations and results of the small operations have the channels last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from bidm_cli.binary.spec import LayerGeometry

if TYPE_CHECKING:
    from bidm_cli.packed.modules import PackedLayer


class Backend(Protocol):
    """One way to run packed layers."""

    name: str
    """As ``--backend`` takes it."""

    def binarize_pack(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        """Signs of x + tau as words, and the sum of |x| over channels.

        x float32 [..., C], threshold [C] or None -> int32 [..., ceil(C / 32)] and float32 [...].
        Bit 1 where x >= -tau; NaN gives 0.
        """

    def binary_conv2d(self, words: Tensor, weights: Tensor, geometry: LayerGeometry) -> Tensor:
        """D, the convolution of signs with zero padding: taps outside the image count nothing.

        words int32 [N, H, W, ceil(C / 32)], weights int32 [O, kh kw, ceil(C / 32)] -> int32 [N, H', W', O].
        """

    def binary_linear(self, words: Tensor, weights: Tensor, channels: int) -> Tensor:
        """D = x . w over signs: words int32 [..., ceil(C / 32)], weights int32 [O, ceil(C / 32)] -> int32
        [..., O].
        """

    def run(self, layer: PackedLayer, x: Tensor) -> Tensor:
        """A whole layer: x float32 [N, C, H, W], [N, C, L] or [..., C], by the layer's kind."""

    def kernel(self, geometry: LayerGeometry) -> str:
        """Which kernel a layer of this shape gets, for ``bidm doctor`` and ``--verbose``."""
