"""Range of a pixel model's values: [-1, 1], or what its configuration says instead.

ddim's ``data.rescaled: false``, score_sde's ``data.centered: false`` and lucidrains' ``auto_normalize=False``
train on images in [0, 1]. Such a model gets a :class:`bidm_cli.networks.value_range.ValueRange` for a first
stage, so that training data and samples are converted wherever latents would be.
"""

from __future__ import annotations

from typing import Literal

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build

Range = Literal["unit", "logit"]
_KIND = "value_range"
_WORDS: dict[str, str] = {"unit": "images in [0, 1]", "logit": "logits of images"}


def set_value_range(checkpoint: Checkpoint, values: Range | None, reason: str = "") -> Checkpoint:
    """Give a pixel model its range, None for [-1, 1]; returns it. ``reason`` goes into the evidence, if any.

    Raises:
        BidmError: a model with a first stage, whose latents have no such range.
    """
    before = checkpoint.architecture.get("first_stage")
    if before is not None and before["kind"] != _KIND:
        raise BidmError("`settings` rescaled is for pixel models; this one has a first stage")
    architecture = None if values is None else {"kind": _KIND, "args": {"kind": values}}
    checkpoint.first_stage = None if architecture is None else build(architecture)
    checkpoint.architecture = {**checkpoint.architecture, "first_stage": architecture}
    if values is not None and reason:
        checkpoint.evidence.append(
            f"the network works on {_WORDS[values]} ({reason}; for [-1, 1] override with `settings` "
            "rescaled=true)"
        )
    return checkpoint


def value_range(model: DiffusionModel) -> Range | None:
    """The range that a pixel model's configuration says; None for [-1, 1] and for latent models."""
    architecture = model.architecture.get("first_stage")
    if architecture is None or architecture["kind"] != _KIND:
        return None
    found: Range = architecture["args"]["kind"]
    return found
