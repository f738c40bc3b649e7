"""Small packed networks of every kind, with connections, for the tests of captured steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from tests.helpers import with_planes
from tests.networks import test_diffusers_unet, test_dit, test_lucidrains_unet, test_uvit
from tests.packed.conftest import randomize, recipe_of

LDM: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 2,
    "num_classes": 5,
    "use_scale_shift_norm": True,
}
CLASSES = {"null_label": 4, "num_classes": 5}


def packed(
    folder: Path,
    kind: str,
    arguments: dict[str, Any],
    shape: tuple[int, int, int],
    device: str = "cpu",
    backend: str = "cupy",
    recipe: str = "bidm",
    planes: int = 1,
    **more: Any,
) -> PackedModel:
    """A network of random weights, binarized with connections, opened for a backend."""
    torch.manual_seed(0)
    architecture = {"unet": {"kind": kind, "args": arguments}, "first_stage": None, "conditioner": None}
    unet, settings = build(architecture["unet"]), recipe_of(recipe)
    if planes > 1:
        settings = with_planes(settings, planes)
    binarize(unet, settings, timesteps=1000)
    randomize(unet)
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    model = DiffusionModel("openai", unet.eval(), shape, schedule, SamplingConvention(), architecture, **more)
    write_packed(folder / "m.bidm", *pack_model(model, settings.to_json()))
    return load_packed(folder / "m.bidm", device=device, backend=backend)


SMALL_DDPM = {**test_diffusers_unet.DDPM, "ch_mult": [1, 2], "num_res_blocks": 1}
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int, int], dict[str, Any]]] = {
    "ldm_unet": ({**LDM, "resblock_updown": True}, (1, 8, 8), CLASSES),
    "dit": (test_dit.ARGUMENTS, (4, 8, 8), {"null_label": 5, "num_classes": 6}),
    "uvit": (test_uvit.ARGUMENTS, (3, 8, 8), {}),
    "ddpm_unet": (SMALL_DDPM, (3, 8, 8), {}),
    "w86_unet": (test_diffusers_unet.W86, (3, 8, 8), {}),
    "diffusers_unet": (
        {"in_channels": 3, "out_channels": 3, **test_diffusers_unet.DIFFUSERS, "layers_per_block": 1},
        (3, 8, 8),
        {},
    ),
    "lucidrains_unet": (test_lucidrains_unet.ARGUMENTS, (3, 8, 8), {}),
}
