"""A tiny teacher, and images for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.distill.objective import Objective, TeacherTargets
from bidm_cli.networks.registry import build

TINY = """
name: tiny
layers:
  - {role: [stem, head, time_embedding], keep: float}
  - {role: [conv, skip, resample], binarize: {}}
  - {role: "*", binarize: {activation_scale: none, shortcut: none}}
tbs: {connect: "decoder[-8:]"}
train: {steps: 4, batch_size: 2, lr: 1.0e-3, lr_binary: 1.0e-3, warmup: 1, ema: 0.9, amp: off}
sampler: {steps: 5}
"""


def make_teacher(seed: int = 0) -> DiffusionModel:
    torch.manual_seed(seed)
    unet = {
        "kind": "ddpm_unet",
        "args": {
            "in_channels": 1,
            "out_channels": 1,
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "attention_levels": [1],
        },
    }
    return DiffusionModel(
        family="ddpm",
        unet=build(unet),
        sample_shape=(1, 8, 8),
        schedule=NoiseSchedule.linear(1000, 1e-4, 0.02),
        convention=SamplingConvention(),
        architecture={"unet": unet, "first_stage": None, "conditioner": None},
    )


def make_latent_teacher(seed: int = 0, scale_factor: float = 0.5) -> DiffusionModel:
    """A teacher of latents 1x8x8 with a first stage for images 3x16x16."""
    model = make_teacher(seed)
    stage = {
        "kind": "kl_first_stage",
        "args": {
            "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
            "attention_levels": [], "z_channels": 3, "embed_dim": 1,
        },
    }  # fmt: skip
    model.family, model.latent, model.scale_factor = "ldm", True, scale_factor
    model.architecture = {**model.architecture, "first_stage": stage}
    model.first_stage = build(stage)
    return model


@pytest.fixture
def teacher() -> DiffusionModel:
    return make_teacher()


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels)
    return path


def prepared(objective: Objective, x0: torch.Tensor, generator: torch.Generator) -> TeacherTargets:
    """Teacher's half of a step on x0 without conditions, as ``generator`` draws it."""
    return objective.prepare(x0, Condition(), objective.draws(len(x0), Condition(), generator))
