"""Layer table and tensors of a network in a packed file, from one with binary layers in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import role_of
from bidm_cli.packed.format.bits import pack_bits
from bidm_cli.packed.format.layer_table import LayerRecord

_KINDS = (nn.Conv2d, nn.Conv1d, nn.Linear, BinaryLayer)


def layer_records(network: nn.Module) -> list[LayerRecord]:
    """Records of all convolutions and linear layers."""
    layers = network.named_modules()
    return [_record(name, layer) for name, layer in layers if isinstance(layer, _KINDS)]


def _record(name: str, layer: nn.Module) -> LayerRecord:
    geometry, spec = None, None
    if isinstance(layer, BinaryLayer):
        geometry, spec = layer.geometry, layer.spec
    else:
        with contextlib.suppress(BidmError):
            geometry = LayerGeometry.of(layer, name)
    return LayerRecord(name, role_of(layer), geometry, spec, getattr(layer, "bias", None) is not None)


def network_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors, with bits and scales in place of a binary layer's latent weights."""
    binary = {name: layer for name, layer in network.named_modules() if isinstance(layer, BinaryLayer)}
    for name, layer in binary.items():
        yield f"{name}.weight_bits", pack_bits(layer.weight.detach())
        scale = layer.weight_scale()
        if scale is not None:
            yield f"{name}.weight_scale", scale.detach()
    for key, tensor in network.state_dict().items():
        if key.removesuffix(".weight") not in binary:
            yield key, tensor
