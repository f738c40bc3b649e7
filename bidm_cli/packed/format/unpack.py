"""Float weights of a packed network, by their original names."""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.bits import unpack_bits
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.packed.model import PackedModel


def float_weights(packed: PackedModel) -> dict[str, Tensor]:
    """The network's weights by their original names, float32; packed layers as alpha * sign(W).

    Raises:
        BidmError: names that differ from the original network's.
    """
    layers = {name: layer for name, layer in packed.unet.named_modules() if isinstance(layer, PackedLayer)}
    weights = {
        key: tensor.detach().cpu()
        for key, tensor in packed.unet.state_dict().items()
        if key.rpartition(".")[0] not in layers
        and not key.startswith(("connections.", "refinement."))
        and not key.endswith(".score_scale")
    }
    for name, layer in layers.items():
        weight = unpack_bits(layer.weight_bits, layer.geometry)
        if layer.weight_scale is not None:
            weight = weight * layer.weight_scale.reshape(-1, *[1] * (weight.dim() - 1))
        weights[f"{name}.weight"] = weight.cpu()
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.cpu()
    refinement = getattr(packed.unet, "refinement", None)
    if refinement is not None:
        for part in ("weight", "bias"):
            weights[f"{refinement.head}.{part}"] = weights[f"{refinement.head}.{part}"][: refinement.outputs]
    with torch.device("meta"):
        original = build(packed.architecture["unet"]).state_dict()
    if original.keys() != weights.keys():
        strange = sorted(original.keys() ^ weights.keys())[:3]
        raise BidmError(f"cannot export: {', '.join(strange)} do not fit the original network")
    return {key: weights[key] for key in original}
