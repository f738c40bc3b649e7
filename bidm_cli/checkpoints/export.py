"""Export to a float checkpoint in the original key layout, for tools that know nothing of bits.

    config = export_checkpoint(load_packed("model.bidm"), Path("model.ckpt"))

A packed layer becomes a float layer with the weights alpha * sign(W). Thresholds, scale maps, shortcuts,
binary attention and cross-timestep connections have no place in the original layout, so what is exported is
the weights alone: in the original network, without its binary activations, they compute something else than
the packed file does. Use them to inspect or to start training from, not to sample.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from bidm_cli.checkpoints.detect import family_named
from bidm_cli.checkpoints.reading.config import CONFIG_SUFFIXES
from bidm_cli.checkpoints.value_range import value_range
from bidm_cli.errors import BidmError
from bidm_cli.files import is_taken
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.packed.format.unpack import float_weights
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.packed.model import PackedModel

WEIGHTS_ONLY = (
    "exported: weights (alpha * sign) and what was float; thresholds, activation scales, shortcuts, binary "
    "attention, cross-timestep connections, further activation planes and refinement nets have no place in "
    "the original layout and are left out"
)
"""Message after an export."""


def export_checkpoint(packed: PackedModel, path: str | Path, overwrite: bool = False) -> Path:
    """Write a float checkpoint that :func:`bidm_cli.load_checkpoint` reads, and its configuration beside it.

    Returns the configuration's path: the checkpoint's name with .yaml, .yml or .json. A diffusers model is a
    folder with its configurations inside.

    Args:
        overwrite: replace a checkpoint or configuration that is there, which may well be the original; the
            packed file itself is never replaced.

    Raises:
        BidmError: a family without an exporter, a setting its configuration cannot say, something in the way,
            or no place to write.
    """
    path, family = Path(path), family_named(packed.family)
    if value_range(packed) is not None and not family.exports_value_range:
        raise BidmError(f"the layout of {family.name} cannot say that the network works on images in [0, 1]")
    _check_target(path, packed.path, family.reads_folders, overwrite)
    model = packed if _has_float_stage(packed) else _without_first_stage(packed)
    return family.export(model, float_weights(packed), path)


def _check_target(path: Path, packed: Path, is_folder: bool, overwrite: bool) -> None:
    """Raise BidmError if the export would replace the packed file, or anything else that it may not."""
    if path.is_file() and packed.is_file() and path.samefile(packed):
        raise BidmError(f"{path} is the packed file itself; name another file")
    configs = [] if is_folder else [path.with_suffix(suffix) for suffix in CONFIG_SUFFIXES]
    taken = next(filter(is_taken, [path, *configs]), None)
    if taken is not None and not overwrite:
        what = "" if taken == path else f" and would be read as the configuration of {path.name}"
        raise BidmError(f"{taken} exists{what}; choose another name, or add `overwrite` to replace it")


def first_stage_line(packed: PackedModel) -> str:
    """One line on the fate of a first stage in an export; empty if it is there as it was."""
    if packed.first_stage is None or value_range(packed) is not None:
        return ""
    if not family_named(packed.family).exports_first_stage:
        return "the first stage is left out, too: in this layout it is another file"
    if not _has_float_stage(packed):
        form = "a binary decoder" if _has_bits(packed.first_stage) else "its decoder alone"
        return (
            f"the first stage is left out, too: the layout wants it whole, the packed file holds {form}; "
            "give the original's with `first_stage` where you open the exported checkpoint"
        )
    if packed.stage_form is not None and packed.stage_form["errors"]:
        return f"the first stage has its weights as rounded to {packed.stage_form['weights']}"
    return ""


def _has_float_stage(packed: PackedModel) -> bool:
    """True unless the first stage lacks its encoder, or its decoder has binary layers."""
    stage = packed.first_stage
    return not isinstance(stage, FirstStage) or (stage.encoder is not None and not _has_bits(stage))


def _has_bits(stage: nn.Module) -> bool:
    """True if a packed first stage has binary layers."""
    return any(isinstance(module, PackedLayer) for module in stage.modules())


def _without_first_stage(packed: PackedModel) -> PackedModel:
    """The same model without its first stage's weights; its architecture can still be named."""
    model = copy.copy(packed)
    model.first_stage, model.latent = None, True
    return model
