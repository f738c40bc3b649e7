"""The op set: what a backend has to do, once, in words. :mod:`bidm_cli.packed.backends.torch` says it in torch.

A backend runs packed layers on one kind of device. The small operations are exact: words and integers are the
same bits on every backend. :meth:`Backend.run` is a whole layer and what surrounds it in a network,

    y = D . K . alpha + bias + |s| P(I) + offset + residual,      I = prologue(x)

whose integers D are exact for the signs that went in, and whose floats agree to rounding. Words are as
:mod:`bidm_cli.packed.format.bits` lays them out; activations and results of the small operations have the channels
last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor, nn

from bidm_cli.networks.geometry import LayerGeometry

if TYPE_CHECKING:
    from bidm_cli.networks.lucidrains_unet import RMSNorm
    from bidm_cli.packed.layers import PackedLayer


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

    def run(
        self,
        layer: PackedLayer,
        x: Tensor,
        prologue: Prologue | None = None,
        offset: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """A whole layer: x float32 [N, C, H, W], [N, C, L] or [..., C], by the layer's kind.

        ``prologue`` comes before it (convolutions only); ``offset`` [N, O] is added to all positions of an
        image (convolutions only), ``residual`` in the result's shape to the result.
        """

    def signs(self, layer: PackedLayer, x: Tensor, prologue: Prologue | None = None) -> Tensor:
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
