"""Storage of a whole packed file's tensors: the network, and beside it first stage and conditioner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bidm_cli.binary.first_stage import planned_decoder
from bidm_cli.binary.surgery import LayerPlan
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.first_stage import FLOATS, StageForm
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.cost.file_sizes import file_sizes, tensor_bytes


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
        specs = _specs(planned_decoder(stage, recipe))
        packed = sum(StageForm.of(model, values).bytes(stage, specs).values())
        found.append(PartCost("first stage", _float_bytes(stage), packed))
    if conditioner is not None:
        size, width = _float_bytes(conditioner), FLOATS[recipe.store.float].itemsize
        found.append(PartCost("conditioner", size, size // 4 * width))
    return tuple(found)


@dataclass(frozen=True)
class StageCost:
    """Network, specs and bytes that the cost of a binary decoder is counted from.

    Attributes:
        network: the float decoder on the meta device. specs: of its binary layers, by name.
        tensors: bytes of the file's tensors, by their names in the first stage, without the encoder's.
    """

    network: FirstStage
    specs: dict[str, BinarySpec]
    tensors: dict[str, int]


def planned_stage(model: DiffusionModel, recipe: Recipe) -> StageCost | None:
    """The decoder that ``recipe`` would make binary; None where it leaves it as it is.

    Raises:
        BidmError: rules that do not fit the decoder.
    """
    stage = _architectures(model)["first_stage"]
    specs = _specs(planned_decoder(stage, recipe))
    if not specs or not isinstance(stage, FirstStage):
        return None
    decoder, form = stage.without_encoder(), StageForm.of(model, recipe.to_json())
    return StageCost(decoder, specs, form.bytes(decoder, specs))


def stored_stage(model: DiffusionModel, path: Path) -> StageCost | None:
    """The binary decoder of a packed file; None without one."""
    stage, packed = _architectures(model)["first_stage"], model.first_stage
    modules = {} if packed is None else dict(packed.named_modules())
    specs = {name: m.spec for name, m in modules.items() if isinstance(m, PackedLayer)}
    if not specs or not isinstance(stage, FirstStage):
        return None
    prefix, left_out = "first_stage.", ("encoder.", "quant_conv.")
    names = {n: size for n, size in tensor_bytes(path).items() if n.startswith(prefix)}
    tensors = {name.removeprefix(prefix): size for name, size in names.items()}
    kept = {name: size for name, size in tensors.items() if not name.startswith(left_out)}
    return StageCost(stage.without_encoder(), specs, kept)


def _specs(planned: list[LayerPlan]) -> dict[str, BinarySpec]:
    return {layer.name: layer.spec for layer in planned if layer.spec is not None}


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
