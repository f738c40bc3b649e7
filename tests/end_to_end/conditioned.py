"""Small checkpoints conditioned on something other than a class, in their families' own layouts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests.checkpoints.conftest import KL, LDM_CONFIG, LDM_UNET, ldm_state, weights
from tests.checkpoints.test_diffusers_condition import _folder as diffusers_folder

TEXT_UNET = {
    **LDM_UNET,
    "use_spatial_transformer": True,
    "context_dim": 24,
    "num_head_channels": -1,
    "num_heads": 8,
}
RESCALER = {
    "target": "ldm.modules.encoders.modules.SpatialRescaler",
    "params": {"n_stages": 1, "in_channels": 5, "out_channels": 3},
}
"""Of maps twice as large as the latents, five classes."""


def ldm(folder: Path, unet: dict[str, Any], cond_stage: Any, extra: dict[str, torch.Tensor]) -> Path:
    """model.ckpt and config.yaml of latents 4x8x8 behind a KL first stage of images 16x16."""
    folder.mkdir(parents=True)
    torch.save({"state_dict": ldm_state(unet=unet) | extra}, folder / "model.ckpt")
    values = copy.deepcopy(LDM_CONFIG)
    values["model"]["params"]["unet_config"]["params"] = unet
    values["model"]["params"]["cond_stage_config"] = cond_stage
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "model.ckpt"


def openai_upscaler(folder: Path) -> Path:
    """guided-diffusion's super-resolution network: three channels and the enlarged image; 6 out."""
    folder.mkdir(parents=True)
    arguments = {**LDM_UNET, "in_channels": 6, "out_channels": 6}
    torch.save(weights("ldm_unet", arguments), folder / "ema_0.9999_000010.pt")
    config = {"unet": {**arguments, "image_size": 8}, "diffusion": {"steps": 1000, "learn_sigma": True}}
    (folder / "hparams.json").write_text(json.dumps({"library": "guided", **config, "image_size": 8}))
    return folder / "ema_0.9999_000010.pt"


def upscaler(folder: Path) -> Path:
    """Stable Diffusion's upscaler: text, a small image with noise, and the noise's level as a label."""
    unet = {**TEXT_UNET, "in_channels": 7, "num_classes": 50, "disable_self_attentions": [True, False]}
    path = ldm(folder, unet, {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"}, {})
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["params"]["low_scale_config"] = {
        "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
        "params": {
            "noise_schedule_config": {"linear_start": 1e-4, "linear_end": 0.02},
            "max_noise_level": 40,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def checkpoint(kind: str, folder: Path) -> Path:
    """The original of ``kind``, one of :data:`KINDS`."""
    text = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"n_embed": 24, "n_layer": 1}}
    first_stage = "__is_first_stage__"
    if kind == "text":
        return ldm(folder, TEXT_UNET, text, {"cond_stage_model.transformer.x.weight": torch.ones(2)})
    if kind == "text inpainting":
        return ldm(folder, {**TEXT_UNET, "in_channels": 9}, text, {})
    if kind == "inpainting":
        return ldm(folder, {**LDM_UNET, "in_channels": 9}, first_stage, {})
    if kind == "semantic":
        mapper = torch.randn(3, 5, 1, 1, generator=torch.Generator().manual_seed(3))
        extra = {"cond_stage_model.channel_mapper.weight": mapper}
        return ldm(folder, {**LDM_UNET, "in_channels": 7}, RESCALER, extra)
    if kind == "super-resolution":
        return ldm(folder, {**LDM_UNET, "in_channels": 7}, {"target": "torch.nn.Identity"}, {})
    if kind == "depth":
        return ldm(folder, {**TEXT_UNET, "in_channels": 5}, text, {})
    if kind == "upscaler":
        return upscaler(folder)
    if kind == "openai":
        return openai_upscaler(folder)
    assert kind == "diffusers"
    folder.mkdir(parents=True)
    return diffusers_folder(folder)


def inputs(kind: str, folder: Path) -> list[str]:
    """Options of ``bidm compress`` and ``bidm sample`` with files for them in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    options: list[str] = []
    if kind in ("text", "text inpainting", "depth", "upscaler", "diffusers"):
        rows = 1 if kind in ("depth", "upscaler") else 3
        np.save(folder / "context.npy", random.standard_normal((rows, 5, 24), dtype=np.float32))
        np.save(folder / "none.npy", random.standard_normal((5, 24), dtype=np.float32))
        options += ["--context", str(folder / "context.npy")]
    if "inpainting" in kind:
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        hole = np.zeros((16, 16), np.uint8)
        hole[4:12, 4:12] = 255
        Image.fromarray(pixels).save(folder / "image.png")
        Image.fromarray(hole).save(folder / "hole.png")
        options += ["--condition", str(folder / "image.png"), "--mask", str(folder / "hole.png")]
    if kind == "semantic":
        np.save(folder / "maps.npy", random.integers(0, 5, (2, 16, 16)))
        options += ["--condition", str(folder / "maps.npy")]
    if kind == "depth":
        np.save(folder / "depth.npy", random.random((2, 1, 16, 16), dtype=np.float32))
        options += ["--condition", str(folder / "depth.npy")]
    if kind in ("super-resolution", "upscaler", "openai"):
        (folder / "small").mkdir(exist_ok=True)
        side = 4 if kind == "openai" else 8
        for name in ("a", "b"):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "small" / f"{name}.png")
        options += ["--condition", str(folder / "small")]
    return options


KINDS = (
    "text", "text inpainting", "inpainting", "semantic", "super-resolution", "depth", "upscaler", "openai",
    "diffusers",
)  # fmt: skip
SAMPLING = {"upscaler": ["--label", "20"]}
"""More options of ``bidm sample``."""
CHANNELS = {"openai": 3}
"""Of what the network denoises, where it is not 4."""
assert KL["embed_dim"] == 4
