"""Options of binary layers and what goes with them: a recipe's ``binarize`` and ``refine``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from bidm_cli.recipe.bounds import Bounds

MOST_PLANES = 3
"""Activation planes that a binary layer can have."""


@dataclass(frozen=True)
class BinarySpec:
    """Parts of the method that a layer has; the keys of a recipe's ``binarize``.

    Attributes:
        activations: "binary" (1-bit weights and activations) or "float" (1-bit weights only).
        weight_scale: alpha. "channel": mean |W_o| of each filter; "layer": one for all; "none".
        activation_scale: the map K = A * k, A = mean over channels of |I|. "learnable" k (BiDM),
            "fixed" k = 1/(kh kw) (XNOR-Net), "none". Only with binary activations.
        threshold: tau of sign(I + tau), one per input channel. "learnable" or "none". Only with binary
            activations.
        shortcut: y + |s| P(I). "tile": parameter-free channel tiling or averaging; "conv": a float 1x1
            conv where the widths differ (the reference code); "none".
        shortcut_init: where s starts.
        binarizer: gradient of the weights' signs in training, by the name of a registered binarizer
            (:func:`bidm_cli.binary.sign.register_binarizer`).
        planes: binary activations as a sum of 1 to 3 planes of signs over one set of 1-bit weights
            (:mod:`bidm_cli.binary.planes`); 2 is W1A2.
    """

    activations: Literal["binary", "float"] = "binary"
    weight_scale: Literal["channel", "layer", "none"] = "channel"
    activation_scale: Literal["learnable", "fixed", "none"] = "learnable"
    threshold: Literal["learnable", "none"] = "learnable"
    shortcut: Literal["tile", "conv", "none"] = "tile"
    shortcut_init: Annotated[float, Bounds(0, 10)] = 0.3
    binarizer: str = "clipped_ste"
    planes: Annotated[int, Bounds(1, MOST_PLANES)] = 1

    def __post_init__(self) -> None:
        # Layer tables of packed files may hold anything.
        if not isinstance(self.binarizer, str):
            raise TypeError(f"binarizer {self.binarizer!r}")
        if type(self.planes) is not int or not 1 <= self.planes <= MOST_PLANES:
            raise ValueError(f"planes is {self.planes!r}; it takes a whole number from 1 to {MOST_PLANES}")
        if self.planes > 1 and self.activations == "float":
            raise ValueError(f"planes {self.planes} goes with binary activations alone")

    def to_json(self) -> dict[str, Any]:
        """All options; defaults of those that files written before them lack are left out."""
        later = {name: getattr(BinarySpec, name) for name in ("binarizer", "planes")}
        return {name: value for name, value in asdict(self).items() if later.get(name) != value}


@dataclass(frozen=True)
class Refine:
    """``refine``: a small float net behind a convolutional head (:mod:`bidm_cli.binary.refinement`).

    Attributes:
        channels: outputs that the head has for it alone. width: channels of its convolutions.
    """

    channels: Annotated[int, Bounds(0, 1024)] = 2
    width: Annotated[int, Bounds(1, 1024)] = 4
