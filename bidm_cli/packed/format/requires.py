"""Features that a reader of a packed file must know, listed in its metadata under ``requires``.

A file names what it uses, so that a later feature needs no new version of the format: a reader that does not
know one of the names refuses the file by that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bidm_cli.errors import BidmError
from bidm_cli.packed.format.layer_table import LayerRecord, read_stage_table

KNOWN = {
    "binary_first_stage": "binary layers in the decoder of the first stage",
    "decoder": "a first stage without its encoder",
    "int6": "weights of the first stage as 6-bit integers with scales",
    "int8": "weights of the first stage as 8-bit integers with scales",
    "latent": "latents of 1 or 3 channels without a first stage, which nothing else tells from pixels",
    "refine": "a refinement net behind the network's head",
    "planes": "layers with more than one activation plane",
    "v": "a network distilled to predict v, whatever the original predicts",
}
"""Features that this version reads, and what they are."""


def required(
    records: Sequence[LayerRecord], recipe: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[str]:
    """Sorted names of what a file needs, by its layer table, recipe and other metadata."""
    stage = metadata.get("first_stage") or {"keep": "both", "weights": "float16", "errors": {}}
    decoder = read_stage_table(metadata)
    quantized = stage["weights"] if stage["errors"] else None
    uses = {
        "binary_first_stage": bool(decoder),
        "decoder": stage["keep"] == "decoder",
        "int6": quantized == "int6",
        "int8": quantized == "int8",
        "latent": "latent" in metadata,
        "planes": any(record.spec is not None and record.spec.planes > 1 for record in [*records, *decoder]),
        "refine": "refinement" in metadata,
        "v": recipe.get("distill", {}).get("predict") == "v",
    }
    return sorted(name for name, used in uses.items() if used)


def check_requires(metadata: Mapping[str, Any]) -> None:
    """Check ``requires`` in the metadata of a packed file against what this version knows.

    Raises:
        BidmError: a feature that this version does not know, or something else than a list of names.
    """
    names = metadata.get("requires", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BidmError(f"its list of required features makes no sense ({str(names)[:60]}); copy it again")
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise BidmError(
            f"it needs {', '.join(unknown)[:80]}, which this version of bidm does not know; upgrade with "
            "pip install -U bidm"
        )
