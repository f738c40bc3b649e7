"""Networks and layers with random weights for the benchmarks: timings do not depend on the values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidm_cli.binary.layer_parts import LAYER_PARTS
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.registry import build
from bidm_cli.packed.choose import choose_backend
from bidm_cli.packed.format.bits import pack_bits
from bidm_cli.packed.format.layer_table import LayerRecord
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.recipe.spec import BinarySpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.networks import published

DIGITS = {
    "kind": "ddpm_unet",
    "args": {
        "in_channels": 1,
        "out_channels": 1,
        "ch": 64,
        "ch_mult": [1, 2],
        "num_res_blocks": 2,
        "attention_levels": [1],
    },
}
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "LDM-4 LSUN-Bedrooms": (published.LDM_UNETS["LSUN-Bedrooms"][0], 64),
    "LSUN-Churches": (published.LDM_UNETS["LSUN-Churches"][0], 32),
    "DDPM CIFAR-10": (published.DDPM_UNETS["CIFAR-10"][0], 32),
    "digits": (DIGITS, 8),
}
"""Architecture, and height and width of its input."""


def model_of(architecture: dict[str, Any], side: int, device: str = "cpu") -> DiffusionModel:
    """A float network for inputs of ``side`` x ``side``; on "meta" without memory."""
    arguments = architecture["args"]
    torch.manual_seed(0)
    with torch.device(device):
        unet = build(architecture).eval()
    return DiffusionModel(
        family="benchmark",
        unet=unet,
        sample_shape=(arguments.get("in_channels", arguments.get("in_chans", 3)), side, side),
        schedule=NoiseSchedule.linear(1000, 1e-4, 0.02),
        convention=SamplingConvention(),
        architecture={"unet": architecture, "first_stage": None, "conditioner": None},
        num_classes=arguments.get("num_classes", arguments.get("label_rows")),
    )


def packed_from(
    layer: nn.Module, spec: BinarySpec, backend: str = "auto", device: str = "cpu"
) -> PackedLayer:
    """The packed layer of a float layer, as if read from a file, on a backend of a device."""
    binary = BinaryLayer.from_float(layer, spec)
    packed = PackedLayer(LayerRecord("layer", "conv", binary.geometry, spec, binary.bias is not None))
    values = {"weight_bits": pack_bits(binary.weight.detach()), "weight_scale": binary.weight_scale()}
    for part in LAYER_PARTS[2:]:
        tensor = getattr(binary, part.name)
        if tensor is not None:
            values[part.name] = tensor.detach()
    packed.load_state_dict(values)
    packed.bind(choose_backend(backend, device))
    return packed
