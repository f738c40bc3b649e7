"""Backend protocol: what runs packed layers, attention, norms and connections on one kind of device.

A packed layer and what surrounds it in a network is

    y = D . K . alpha + bias + |s| P(I) + offset + residual,      I = prologue(x)

whose integers D are exact on every backend for the signs that went in, and whose floats agree to rounding.
:mod:`bidm_cli.packed.backends.torch` is the reference.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bidm_cli.networks.fusion import Features, Prologue
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.tensors import LayerTensors


class Backend(Protocol):
    """One way to run packed layers.

    A backend that compiles at first use may have a ``warm_up(say)`` that does it ahead of time and says so.
    """

    name: str
    """As ``--backend`` takes it."""

    channels_last: bool
    """True if convolutions take and give tensors with the channels last."""

    reads_virtual: bool
    """True if :meth:`run` reads concatenations and upsampled pixels in place, without a copy."""

    def fuses(self, prologue: Prologue | None) -> bool:
        """True if :meth:`run` and :meth:`normalize` can do this prologue."""

    def run(
        self,
        layer: LayerTensors,
        x: Features,
        prologue: Prologue | None = None,
        upsample: int = 1,
        offset: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """A whole layer: x float32 [N, C, H, W] (in parts, too), [N, C, L] or [..., C], by the layer's kind.

        ``prologue`` comes before it (convolutions only), then nearest neighbour upsampling (2-d ones only);
        ``offset`` [N, O] is added to all positions of an image (convolutions only), ``residual`` in the
        result's shape to the result.
        """

    def signs(
        self, layer: LayerTensors, x: Features, prologue: Prologue | None = None, upsample: int = 1
    ) -> Tensor:
        """The signs that :meth:`run` computes with, bool (+1 is true), one per element of its whole input."""

    def normalize(self, x: Tensor, prologue: Prologue) -> Tensor:
        """The prologue alone, on x [N, C, ...]."""

    def blend(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        """A connection: (1 - beta) new + beta old, for features [N, ...] of the same shape and betas [N].

        The result may be ``old`` itself while a step is recorded (:mod:`bidm_cli.packed.recording.denoiser`).
        """

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """softmax(q k^T scale) v in floats; shapes as :class:`bidm_cli.networks.layers.AttentionProduct`."""

    def binary_attention(
        self, q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
    ) -> Tensor:
        """The same with scores from signs, :func:`bidm_cli.binary.attention.binary_attention`; score_scale
        [heads] or [1].
        """

    def kernel(self, geometry: LayerGeometry) -> str:
        """Name of the kernel that a layer of this shape gets, for ``bidm doctor`` and ``--verbose``."""
