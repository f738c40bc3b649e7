"""Export to CompVis' layout: a pruned file with its config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bidm_cli.checkpoints.exporting import square_side, write_checkpoint
from bidm_cli.checkpoints.families.ddpm import original_arguments
from bidm_cli.diffusion.augmentation import NoiseAugmentation
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError

_BETAS = {"linear": "sqrt_linear", "scaled_linear": "linear", "cosine": "cosine"}
"""LDM's words for our schedules."""


def write_ldm(model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
    """Write a file with the U-Net's ``weights``, first stage, conditioner and buffers, and its config.yaml.

    Raises:
        BidmError: a setting that LDM's configuration cannot say, or no place to write.
    """
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}
    for prefix, part in (("first_stage_model", model.first_stage), ("cond_stage_model", model.conditioner)):
        if part is not None:
            tensors |= {f"{prefix}.{key}": tensor.cpu() for key, tensor in part.state_dict().items()}
    tensors["betas"] = model.schedule.betas.float()
    tensors["alphas_cumprod"] = model.schedule.alphas_cumprod.float()
    tensors["scale_factor"] = torch.tensor(model.scale_factor)
    return write_checkpoint(path, {"state_dict": tensors}, _config(model), ".yaml")


def _config(model: DiffusionModel) -> dict[str, Any]:
    """CompVis' config.yaml."""
    latent = not model.convention.clip_ancestral
    params: dict[str, Any] = {
        "timesteps": model.schedule.timesteps,
        "parameterization": {"epsilon": "eps"}.get(model.prediction, model.prediction),
        "image_size": list(model.sample_shape[1:]),
        "channels": model.sample_shape[0],
        "scale_factor": model.scale_factor,
        "unet_config": _network(model),
        "first_stage_config": _first_stage(model),
        "cond_stage_config": _conditioner(model),
        "use_ema": False,
    }
    kind = model.schedule.description["kind"]
    if kind in _BETAS:
        params["beta_schedule"] = _BETAS[kind]
    if kind in ("linear", "scaled_linear"):
        params["linear_start"] = model.schedule.description["start"]
        params["linear_end"] = model.schedule.description["end"]
    if model.convention.variance == "large":
        params["v_posterior"] = 1.0
    if model.augmentation is not None:
        params["low_scale_config"] = _low_scale(model.augmentation)
    # An explicit schedule needs no words: the checkpoint's buffers decide.
    target = "ldm.models.diffusion.ddpm." + ("LatentDiffusion" if latent else "DDPM")
    return {"model": {"target": target, "params": params}}


def _low_scale(augmentation: NoiseAugmentation) -> dict[str, Any]:
    """Noise on an upscaler's small image, in the words of Stability's code."""
    described = augmentation.schedule.description
    if described["kind"] != "scaled_linear":
        raise BidmError("LDM's configuration cannot say this model's noise levels")
    schedule = {"linear_start": described["start"], "linear_end": described["end"]}
    schedule["timesteps"] = augmentation.schedule.timesteps
    return {
        "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
        "params": {"noise_schedule_config": schedule, "max_noise_level": augmentation.levels},
    }


def _network(model: DiffusionModel) -> dict[str, Any]:
    architecture = model.architecture["unet"]
    if architecture["kind"] == "ddpm_unet":
        size = square_side(model)
        params = {"resolution": size, **original_arguments(architecture["args"], size)}
        return {"target": "ldm.modules.diffusionmodules.model.Model", "params": params}
    params = {key: value for key, value in architecture["args"].items() if value is not None}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _first_stage(model: DiffusionModel) -> dict[str, Any]:
    architecture = model.architecture.get("first_stage")
    if architecture is None:
        kind = "VQModelInterface" if model.is_latent else "IdentityFirstStage"
        return {"target": f"ldm.models.autoencoder.{kind}"}
    arguments = architecture["args"]
    resolution = model.sample_shape[1] * 2 ** (len(arguments["ch_mult"]) - 1)
    shape = {
        "double_z": arguments["double_z"],
        "z_channels": arguments["z_channels"],
        "resolution": resolution,
        "in_channels": arguments["in_channels"],
        "out_ch": arguments["out_channels"],
        "ch": arguments["ch"],
        "ch_mult": list(arguments["ch_mult"]),
        "num_res_blocks": arguments["num_res_blocks"],
        "attn_resolutions": [resolution // 2**level for level in arguments["attention_levels"]],
        "attn_type": "vanilla" if arguments.get("mid_attention", True) else "none",
        "resamp_with_conv": arguments.get("resamp_with_conv", True),
        "tanh_out": arguments.get("tanh_out", False),
        "dropout": 0.0,
    }
    params: dict[str, Any] = {"embed_dim": arguments["embed_dim"], "ddconfig": shape}
    if architecture["kind"] == "vq_first_stage":
        params["n_embed"] = arguments["n_embed"]
        return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def _conditioner(model: DiffusionModel) -> dict[str, Any] | str:
    architecture = model.architecture.get("conditioner")
    if architecture is None:
        return "__is_unconditional__"
    name = "SpatialRescaler" if architecture["kind"] == "spatial_rescaler" else "ClassEmbedder"
    params = dict(architecture["args"])
    if model.null_label is not None and model.null_label == params.get("n_classes", 0) - 1:
        # Labels dropped in training say that the last row means "no class".
        params["ucg_rate"] = 0.1
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}
