"""Backend protocol: what runs packed layers, attention, norms and connections on one kind of device.

A packed layer and what surrounds it in a network is

    y = D . K . alpha + bias + |s| P(I) + offset + residual,      I = prologue(x)

whose integers D are exact on every backend for the signs that went in, and whose floats agree to rounding.
:mod:`bidm_cli.packed.backends.torch` is the reference.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.lucidrains_unet import RMSNorm
from bidm_cli.packed.tensors import LayerTensors


class Prologue(NamedTuple):
    """What happens to a layer's input first: a norm, then FiLM, then SiLU.

        I = silu(norm(x) * (1 + scale) + shift)

    Attributes:
        norm: a group norm, or lucidrains' RMS norm (not on cupy). silu: whether SiLU follows.
        scale, shift: [N, C], both or neither.
    """

    norm: nn.GroupNorm | RMSNorm
    silu: bool = False
    scale: Tensor | None = None
    shift: Tensor | None = None


class Backend(Protocol):
    """One way to run packed layers.

    A backend that compiles at first use may have a ``warm_up(say)`` that does it ahead of time and says so.
    """

    name: str
    """As ``--backend`` takes it."""

    channels_last: bool
    """True if convolutions take and give tensors with the channels last."""

    reads_lazily: bool
    """True if :meth:`run` takes virtual inputs."""

    def run(
        self,
        layer: LayerTensors,
        x: Tensor,
        prologue: Prologue | None = None,
        offset: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """A whole layer: x float32 [N, C, H, W], [N, C, L] or [..., C], by the layer's kind.

        ``prologue`` comes before it (convolutions only); ``offset`` [N, O] is added to all positions of an
        image (convolutions only), ``residual`` in the result's shape to the result.
        """

    def signs(self, layer: LayerTensors, x: Tensor, prologue: Prologue | None = None) -> Tensor:
        """The signs that :meth:`run` computes with, bool (+1 is true), one an input element."""

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
        """Which kernel a layer of this shape gets, for ``bidm doctor`` and ``--verbose``."""
