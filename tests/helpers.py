"""Random tensors, packed layers and comparisons that several test folders share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bidm_cli.binary.layer_parts import LAYER_PARTS
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.packed.backend import Backend
from bidm_cli.packed.choose import choose_backend
from bidm_cli.packed.format.bits import pack_bits
from bidm_cli.packed.format.layer_table import LayerRecord
from bidm_cli.packed.layers import PackedLayer, RunsOnBackend
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.spec import BinarySpec


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(original: nn.Module, spec: BinarySpec) -> PackedLayer:
    """A packed layer on the CPU's backend, with random thresholds, scales and shortcuts."""
    binary = BinaryLayer.from_float(original, spec)
    record = LayerRecord("layer", "conv", binary.geometry, spec, original.bias is not None)
    layer = PackedLayer(record)
    values = {"weight_bits": pack_bits(binary.weight.detach())}
    if spec.weight_scale != "none":
        values["weight_scale"] = binary.weight_scale()
    for name in [part.name for part in LAYER_PARTS[2:]]:
        tensor = getattr(binary, name)
        if tensor is not None:
            values[name] = tensor.detach() + 0.1 * random(tuple(tensor.shape), 5)
    layer.load_state_dict(values)
    layer.bind(choose_backend("auto", "cpu"))
    return layer.requires_grad_(False)


def with_planes(recipe: Recipe, planes: int) -> Recipe:
    """The recipe with ``planes`` activation planes in every rule that makes layers binary."""
    layers = [
        rule if rule.binarize is None else replace(rule, binarize=replace(rule.binarize, planes=planes))
        for rule in recipe.layers
    ]
    return replace(recipe, layers=tuple(layers))


def on(network: nn.Module, backend: Backend) -> None:
    """Bind all of a network's modules to a backend."""
    for module in network.modules():
        if isinstance(module, RunsOnBackend):
            module.bind(backend)


def norm_of(groups: int, channels: int, affine: bool = True) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6, affine=affine)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(1 + 0.3 * random((channels,), 1))
            norm.bias.copy_(0.3 * random((channels,), 2))
    return norm.requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 3e-6) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(float(b.abs().max()), 1.0))
