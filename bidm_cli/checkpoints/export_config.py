"""Configurations of exported checkpoints, in the layouts of the original projects."""

from __future__ import annotations

from typing import Any

from bidm_cli.diffusion.augmentation import NoiseAugmentation
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError

_BETAS = {"linear": "linear", "scaled_linear": "quad"}
"""The DDPM family's words for our schedules."""

_LDM_BETAS = {"linear": "sqrt_linear", "scaled_linear": "linear", "cosine": "cosine"}
"""LDM's words for the same."""

_VARIANCES = {"small": "fixedsmall", "large": "fixedlarge"}


def ddim_config(model: DiffusionModel) -> dict[str, Any]:
    """ermongroup/ddim's .yml.

    Raises:
        BidmError: a schedule or image shape that it has no words for.
    """
    size = _side(model)
    return {
        "data": {"image_size": size, "channels": model.sample_shape[0], "rescaled": True},
        "model": {"type": "simple", "var_type": "fixedlarge", "ema": True, **_ddpm_network(model, size)},
        "diffusion": {
            "beta_schedule": _schedule_name(model, _BETAS),
            "beta_start": model.schedule.description["start"],
            "beta_end": model.schedule.description["end"],
            "num_diffusion_timesteps": model.schedule.timesteps,
        },
    }


def pesser_config(model: DiffusionModel) -> dict[str, Any]:
    """JSON of the arguments of pesser/pytorch_diffusion's constructors.

    Raises:
        BidmError: as :func:`ddim_config`.
    """
    size = _side(model)
    return {
        "unet": {"resolution": size, **_ddpm_network(model, size)},
        "diffusion": {
            "beta_schedule": _schedule_name(model, _BETAS),
            "beta_0": model.schedule.description["start"],
            "beta_T": model.schedule.description["end"],
            "T": model.schedule.timesteps,
            "model_var_type": _VARIANCES.get(model.convention.variance, "fixedlarge"),
        },
    }


def ldm_config(model: DiffusionModel) -> dict[str, Any]:
    """CompVis' config.yaml.

    Raises:
        BidmError: a network or first stage that it has no words for.
    """
    latent = not model.convention.clip_ancestral
    params: dict[str, Any] = {
        "timesteps": model.schedule.timesteps,
        "parameterization": {"epsilon": "eps"}.get(model.prediction, model.prediction),
        "image_size": list(model.sample_shape[1:]),
        "channels": model.sample_shape[0],
        "scale_factor": model.scale_factor,
        "unet_config": _ldm_network(model),
        "first_stage_config": _first_stage(model),
        "cond_stage_config": _conditioner(model),
        "use_ema": False,
    }
    kind = model.schedule.description["kind"]
    if kind in _LDM_BETAS:
        params["beta_schedule"] = _LDM_BETAS[kind]
    if kind in ("linear", "scaled_linear"):
        params["linear_start"] = model.schedule.description["start"]
        params["linear_end"] = model.schedule.description["end"]
    if model.augmentation is not None:
        params["low_scale_config"] = _low_scale(model.augmentation)
    # An explicit schedule needs no words: the checkpoint's buffers decide.
    target = "ldm.models.diffusion.ddpm." + ("LatentDiffusion" if latent else "DDPM")
    return {"model": {"target": target, "params": params}}


def _low_scale(augmentation: NoiseAugmentation) -> dict[str, Any]:
    """Noise on an upscaler's small image, in the words of Stability's code.

    Raises:
        BidmError: a schedule that it has no words for.
    """
    described = augmentation.schedule.description
    if described["kind"] != "scaled_linear":
        raise BidmError("LDM's configuration cannot say this model's noise levels")
    schedule = {"linear_start": described["start"], "linear_end": described["end"]}
    schedule["timesteps"] = augmentation.schedule.timesteps
    return {
        "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
        "params": {"noise_schedule_config": schedule, "max_noise_level": augmentation.levels},
    }


def _side(model: DiffusionModel) -> int:
    _, height, width = model.sample_shape
    if height != width:
        raise BidmError(f"the DDPM layout has square images only, this model's are {height}x{width}")
    return height


def _schedule_name(model: DiffusionModel, names: dict[str, str]) -> str:
    kind = model.schedule.description.get("kind")
    if kind not in names:
        raise BidmError(f"a configuration of the DDPM family cannot say a noise schedule of kind {kind!r}")
    return names[kind]


def _ddpm_network(model: DiffusionModel, size: int) -> dict[str, Any]:
    return _ddpm_arguments(model.architecture["unet"]["args"], size)


def _ddpm_arguments(arguments: dict[str, Any], size: int) -> dict[str, Any]:
    """Arguments of :class:`DDPMUNet` in the original's words."""
    levels = arguments["attention_levels"]
    return {
        "ch": arguments["ch"],
        "out_ch": arguments["out_channels"],
        "ch_mult": list(arguments["ch_mult"]),
        "num_res_blocks": arguments["num_res_blocks"],
        "attn_resolutions": [size // 2**level for level in levels],
        "dropout": arguments.get("dropout", 0.0),
        "in_channels": arguments["in_channels"],
        "resamp_with_conv": arguments.get("resamp_with_conv", True),
        "conv_shortcut": arguments.get("conv_shortcut", False),
    }


def _ldm_network(model: DiffusionModel) -> dict[str, Any]:
    architecture = model.architecture["unet"]
    if architecture["kind"] == "ddpm_unet":
        size = _side(model)
        params = {"resolution": size, **_ddpm_arguments(architecture["args"], size)}
        return {"target": "ldm.modules.diffusionmodules.model.Model", "params": params}
    params = {key: value for key, value in architecture["args"].items() if value is not None}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _first_stage(model: DiffusionModel) -> dict[str, Any]:
    architecture = model.architecture.get("first_stage")
    if architecture is None:
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}
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
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": dict(architecture["args"])}
