"""Small models for the tests of the report, inspect and bench, and the public LSUN-Bedrooms configuration."""

from __future__ import annotations

import copy
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
from bidm_cli.recipe import Recipe

LSUN_BEDROOMS_UNET = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 224,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 32,
}
TINY_DDPM = {
    "in_channels": 1,
    "out_channels": 1,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
}


def lsun_bedrooms_config() -> dict[str, Any]:
    """The config.yaml of LDM-4 on LSUN-Bedrooms, as published, down to what says something on the U-Net."""
    first_stage = {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 2, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }
    parameters = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "image_size": 64,
        "channels": 3,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": LSUN_BEDROOMS_UNET,
        },
        "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": first_stage},
        "cond_stage_config": "__is_unconditional__",
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": parameters}}


def model_of(
    kind: str, args: dict[str, Any], sample_shape: tuple[int, int, int], device: str = "cpu"
) -> DiffusionModel:
    """A float model with random weights; on "meta" without any."""
    architecture = {"unet": {"kind": kind, "args": args}, "first_stage": None, "conditioner": None}
    torch.manual_seed(0)
    with torch.device(device):
        unet = build(architecture["unet"])  # type: ignore[arg-type]
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    return DiffusionModel("ddpm", unet, sample_shape, schedule, SamplingConvention(), architecture)


def lsun_bedrooms() -> DiffusionModel:
    """The U-Net alone, on the meta device."""
    args = {key: value for key, value in LSUN_BEDROOMS_UNET.items() if key != "image_size"}
    return model_of("ldm_unet", args, (3, 64, 64), "meta")


def tiny() -> DiffusionModel:
    """A DDPM U-Net for 8x8 images."""
    return model_of("ddpm_unet", TINY_DDPM, (1, 8, 8))


def student_of(model: DiffusionModel, recipe: str = "bidm") -> DiffusionModel:
    """A binarized copy."""
    student = copy.deepcopy(model)
    binarize(student.unet, Recipe.load(recipe), model.schedule.timesteps)
    return student


def packed_of(
    model: DiffusionModel, path: Path, recipe: str = "bidm", training: dict[str, Any] | None = None
) -> PackedModel:
    """The model binarized as the recipe says, untrained, written to ``path`` and opened again."""
    json = Recipe.load(recipe).to_json()
    write_packed(path, *pack_model(student_of(model, recipe), json, {"seed": 0}, training))
    return load_packed(path, backend="torch")
