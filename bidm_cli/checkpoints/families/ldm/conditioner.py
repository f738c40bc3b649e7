"""Conditioner of an LDM, ``cond_stage_model`` of the file: conditions to what the network takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bidm_cli.checkpoints.families.ldm.config import LDMSettings
from bidm_cli.checkpoints.first_stages.compvis import Architecture
from bidm_cli.checkpoints.reading.state import load_strictly, with_prefix

CONDITIONER = "cond_stage_model."


def load_conditioner(
    tensors: dict[str, Tensor], settings: LDMSettings, origin: str, notes: list[str]
) -> tuple[Architecture | None, nn.Module | None]:
    """(architecture, network) of a class embedder or rescaler; (None, None) of anything else, which is noted.

    Args:
        tensors: the whole state dict.
        origin: where the architecture comes from; for messages.

    Raises:
        BidmError: its weights do not fit.
    """
    weights = with_prefix(tensors, CONDITIONER)
    if set(weights) == {"embedding.weight"} and weights["embedding.weight"].dim() == 2:
        rows, width = weights["embedding.weight"].shape
        inferred = {"kind": "class_embedder", "args": {"n_classes": rows, "embed_dim": width}}
        architecture = settings.conditioner or inferred
        network = load_strictly(architecture, weights, "class embedder", origin=origin)
        return architecture, network.requires_grad_(False)
    rescaler = weights.get("channel_mapper.weight")
    if rescaler is not None and rescaler.dim() == 4:
        return _rescaler(weights, settings, origin, notes)
    if settings.conditioner is not None:
        notes.append("no class embedder: the configuration names one, the file has none")
    elif weights and "encoder.conv_in.weight" not in weights:
        notes.append(
            f"conditioner {settings.conditioned_by or '(unknown kind)'}: give embeddings (--context) or, if "
            "it encodes text, prompts (--prompt)"
        )
    return None, None


def _rescaler(
    weights: dict[str, Tensor], settings: LDMSettings, origin: str, notes: list[str]
) -> tuple[Architecture, nn.Module]:
    """The rescaler of segmentation maps of LDM's semantic synthesis."""
    architecture = settings.conditioner
    if architecture is None or architecture["kind"] != "spatial_rescaler":
        rows, classes = weights["channel_mapper.weight"].shape[:2]
        arguments: dict[str, Any] = {"n_stages": 2, "in_channels": classes, "out_channels": rows}
        arguments |= {"method": "bilinear", "multiplier": 0.5, "bias": "channel_mapper.bias" in weights}
        architecture = {"kind": "spatial_rescaler", "args": arguments}
        notes.append("segmentation maps are halved twice, bilinearly (assumed, as LDM's semantic synthesis)")
    network = load_strictly(architecture, weights, "segmentation rescaler", origin=origin)
    notes.append(f"conditioner: segmentation maps of {architecture['args']['in_channels']} classes, rescaled")
    return architecture, network.requires_grad_(False)
