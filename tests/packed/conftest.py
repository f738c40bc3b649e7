"""Small binarized models for the tests of bidm_cli.packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.registry import build
from bidm_cli.recipe import Recipe

MIXED_PLANES = """
name: mixed planes
layers:
  - {role: [stem, head, time_embedding], keep: float}
  - {role: conv, binarize: {activation_scale: learnable, threshold: learnable, shortcut: tile, planes: 3}}
  - {role: [skip, resample], binarize: {activation_scale: learnable, threshold: learnable, planes: 2}}
  - {role: "*", binarize: {activation_scale: none, threshold: learnable, shortcut: none}}
"""


def recipe_of(name: str) -> Recipe:
    """A recipe that comes with bidm, or "mixed planes": one to three by rule."""
    return Recipe.parse(MIXED_PLANES) if name == "mixed planes" else Recipe.load(name)


def randomize(network: nn.Module, seed: int = 0) -> None:
    """Give thresholds, scale filters, shortcuts and connections values a trained network might have."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, spread: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * spread

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, BinaryLayer):
                for name, part in module.named_parameters():
                    if name not in ("weight", "shortcut_weight"):
                        part.add_(noise(part, 0.1))
        connections = getattr(network, "connections", None)
        if connections is not None:
            connections.beta.add_(noise(connections.beta, 0.1))


def small_student(recipe: str = "bidm", seed: int = 0, ch: int = 32) -> DiffusionModel:
    """A binarized DDPM U-Net for 8x8 images."""
    torch.manual_seed(seed)
    arguments = {
        "in_channels": 1,
        "out_channels": 1,
        "ch": ch,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_levels": [1],
    }
    architecture = {
        "unet": {"kind": "ddpm_unet", "args": arguments},
        "first_stage": None,
        "conditioner": None,
    }
    unet = build(architecture["unet"])
    binarize(unet, Recipe.load(recipe), timesteps=1000)
    randomize(unet, seed)
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    return DiffusionModel("ddpm", unet.eval(), (1, 8, 8), schedule, SamplingConvention(), architecture)


@pytest.fixture
def student() -> Callable[..., DiffusionModel]:
    return small_student
