"""Metadata and tensors of a packed file from a trained student."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bidm_cli.binary.attention import BinaryAttention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import NULL_CONTEXT, format_version, network_bytes
from bidm_cli.packed.format.first_stage import FLOATS, StageForm
from bidm_cli.packed.format.layer_table import UNET, AttentionRecord
from bidm_cli.packed.format.network import layer_records, network_tensors
from bidm_cli.packed.format.quantized import to_storage
from bidm_cli.packed.format.requires import required


def pack_model(
    model: DiffusionModel,
    recipe_json: dict[str, Any],
    provenance: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    caveats: list[dict[str, str]] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a packed file for a model whose ``unet`` has been binarized.

    ``caveats`` as :func:`bidm_cli.checkpoints.evidence.caveats_json`; the key is left out without any.
    Floats are rounded to ``recipe_json["store"]["float"]``; a tensor that does not fit float16 keeps float32.
    The first stage has the form of ``recipe_json["first_stage"]``, and all of it in those floats without;
    binary layers of its decoder are packed as the network's.

    Raises:
        BidmError: a number that is not finite, or no binary layer in the network.
    """
    float_type = FLOATS[recipe_json.get("store", {}).get("float", "float16")]
    records = layer_records(model.unet)
    if not any(record.spec for record in records):
        raise BidmError("the network has no binary layer, there is nothing to pack; binarize it first")
    tensors = {UNET + name: tensor for name, tensor in network_tensors(model.unet)}
    if model.conditioner is not None:
        tensors |= {f"conditioner.{name}": value for name, value in model.conditioner.state_dict().items()}
    if model.null_context is not None:
        tensors[NULL_CONTEXT] = model.null_context
    stored = {name: to_storage(tensor, float_type, name) for name, tensor in tensors.items()}
    stage, about_stage = _first_stage(model, recipe_json)
    stored |= stage
    connections = getattr(model.unet, "connections", None)
    metadata = {
        **model.metadata(),
        "recipe": recipe_json,
        "layers": [record.to_json() for record in records],
        "connections": None if connections is None else connections.to_json(),
        "provenance": provenance or {},
        "training": training or {},
        "network_bytes": network_bytes(stored),
    }
    if about_stage is not None:
        metadata["first_stage"] = about_stage
    if caveats:
        metadata["caveats"] = caveats
    attention = [
        AttentionRecord(name, len(product.score_scale)).to_json()
        for name, product in model.unet.named_modules()
        if isinstance(product, BinaryAttention)
    ]
    if attention:
        metadata["attention"] = attention
    refinement = getattr(model.unet, "refinement", None)
    if refinement is not None:
        metadata["refinement"] = refinement.to_json()
    if requires := required(records, recipe_json, metadata):
        metadata["requires"] = requires
    metadata["format_version"] = format_version(metadata)
    return metadata, stored


def _first_stage(
    model: DiffusionModel, recipe_json: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of the first stage under their names in the file, and what the metadata says of it."""
    if model.first_stage is None:
        return {}, None
    tensors, about = StageForm.of(model, recipe_json).store(model.first_stage)
    return {f"first_stage.{name}": tensor for name, tensor in tensors.items()}, about
