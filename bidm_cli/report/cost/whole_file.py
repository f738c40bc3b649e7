"""Storage of a whole packed file's tensors: the network, and beside it first stage and conditioner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.first_stage import FLOATS, StageForm
from bidm_cli.recipe import Recipe
from bidm_cli.report.cost.file_sizes import file_sizes


@dataclass(frozen=True)
class PartCost:
    """Bytes of a part beside the network: in float32, a first stage with its encoder, and in the file."""

    name: str
    float_bytes: int
    packed_bytes: int


def planned_parts(model: DiffusionModel, recipe: Recipe) -> tuple[PartCost, ...]:
    """Parts of the file that ``recipe`` would make of a model, by their shapes alone."""
    found, values = [], recipe.to_json()
    stage, conditioner = _architectures(model).values()
    if stage is not None:
        found.append(PartCost("first stage", _float_bytes(stage), StageForm.of(model, values).bytes(stage)))
    if conditioner is not None:
        size, width = _float_bytes(conditioner), FLOATS[recipe.store.float].itemsize
        found.append(PartCost("conditioner", size, size // 4 * width))
    return tuple(found)


def stored_parts(model: DiffusionModel, path: Path) -> tuple[PartCost, ...]:
    """Parts of a packed file, with the bytes that they really take."""
    sizes = file_sizes(path)
    stage, conditioner = map(_float_bytes, _architectures(model).values())
    parts = [
        PartCost("first stage", stage, sizes.first_stage),
        PartCost("conditioner", conditioner, sizes.conditioner),
    ]
    return tuple(part for part in parts if part.float_bytes or part.packed_bytes)


def _architectures(model: DiffusionModel) -> dict[str, nn.Module | None]:
    """First stage and conditioner as they were, without weights; None where the model has none."""
    found: dict[str, nn.Module | None] = {}
    for part in ("first_stage", "conditioner"):
        architecture = None if getattr(model, part) is None else model.architecture.get(part)
        with torch.device("meta"):
            found[part] = None if architecture is None else build(architecture)
    return found


def _float_bytes(network: nn.Module | None) -> int:
    return 0 if network is None else sum(4 * tensor.numel() for tensor in network.state_dict().values())
