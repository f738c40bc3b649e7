"""Attention heads of patch transformers (DiT, U-ViT), which no weight shows."""

from __future__ import annotations

from collections.abc import Mapping

from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError

LATENT_SCALE = 0.18215
"""Scale of Stable Diffusion's latents, on which both families' published models are trained."""

_OVERRIDE = "override with --set num_heads=N"


def configured_heads(section: Section) -> int | None:
    """``num_heads`` of a configuration; None if it does not say.

    Raises:
        BidmError: a number that makes no sense.
    """
    if "num_heads" not in section:
        return None
    heads = section.integer("num_heads")
    if not 1 <= heads <= 1024:
        raise section.wrong("num_heads", "1 to 1024", heads)
    return heads


def assumed_heads(width: int, published: Mapping[int, int], name: str, notes: list[str]) -> int:
    """Heads of a ``name`` as in the published one of its width, or 64 channels wide; noted.

    Raises:
        BidmError: neither fits.
    """
    if width in published:
        notes.append(
            f"attention heads: {published[width]} (as the published {name} of width {width}; {_OVERRIDE})"
        )
        return published[width]
    if width % 64:
        raise BidmError(
            f"the number of attention heads is not in the file and no published {name} has the width "
            f"{width}; give it, as in --set num_heads=8"
        )
    notes.append(f"attention heads: {width // 64} (assumed: 64 channels each; {_OVERRIDE})")
    return width // 64
