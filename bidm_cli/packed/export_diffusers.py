"""A diffusers folder: ``model_index.json``, unet/, vae/ or vqvae/, scheduler/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned_range": "learned_range"}
_FIRST_STAGES = {"diffusers_vq": ("vqvae", "VQModel"), "diffusers_kl": ("vae", "AutoencoderKL")}


def export_folder(model: DiffusionModel, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Write the folder; returns its ``unet/config.json``.

    Raises:
        BidmError: a network or first stage that is not diffusers' own, a setting its files cannot say, a file
            in the way, or no place to write.
    """
    if model.architecture["unet"]["kind"] != "diffusers_unet":
        raise BidmError(
            "a UNet2DConditionModel is kept under LDM's names, which cannot be exported to diffusers"
        )
    if folder.exists() and not folder.is_dir():
        raise BidmError(f"{folder} is a file; a diffusers model is a folder, name another one")
    index = {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    parts = [("unet", unet_config(model), dict(weights))]
    stage = model.architecture.get("first_stage")
    if stage is not None and model.first_stage is not None:
        name, class_name = _first_stage_of(stage)
        index |= {"_class_name": "LDMPipeline", name: ["diffusers", class_name]}
        state = {key: tensor.detach().cpu() for key, tensor in model.first_stage.state_dict().items()}
        parts.append((name, first_stage_config(model), state))
    files: dict[Path, bytes] = {
        folder / "scheduler" / "scheduler_config.json": _json(scheduler_config(model))
    }
    for name, config, tensors in parts:
        plain = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        files[folder / name / _WEIGHTS] = safetensors.torch.save(plain, metadata={"format": "pt"})
        files[folder / name / "config.json"] = _json(config)
    files[folder / "model_index.json"] = _json(index)
    for path, content in files.items():
        with write_atomically(path) as temporary:
            temporary.write_bytes(content)
    return folder / "unet" / "config.json"


def unet_config(model: DiffusionModel) -> dict[str, Any]:
    """``config.json`` of a ``UNet2DModel``."""
    arguments = model.architecture["unet"]["args"]
    downs = set(arguments.get("attention_levels", ()))
    ups = arguments.get("up_attention_levels")
    ups = downs if ups is None else set(ups)
    resnets_down = set(arguments.get("resnet_down_levels", ()))
    resnets_up = set(arguments.get("resnet_up_levels", ()))
    levels = range(len(arguments["block_out_channels"]))
    film = arguments.get("film", False)
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": list(model.sample_shape[1:]),
        "down_block_types": [_type("Down", i, downs, resnets_down) for i in levels],
        "up_block_types": [_type("Up", i, ups, resnets_up) for i in reversed(levels)],
        "downsample_type": "resnet" if downs & resnets_down else "conv",
        "upsample_type": "resnet" if ups & resnets_up else "conv",
        "resnet_time_scale_shift": "scale_shift" if film else "default",
        "add_attention": arguments.get("mid_attention", True),
        "mid_block_scale_factor": arguments.get("mid_scale", 1.0),
        "num_class_embeds": arguments.get("num_classes"),
        "attention_head_dim": arguments.get("attention_head_dim", 8),
    }
    if film and arguments.get("mid_attention_norm", True):
        config["attn_norm_num_groups"] = arguments.get("norm_num_groups", 32)
    same = (
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "downsample_padding",
        "norm_num_groups", "norm_eps", "freq_shift", "flip_sin_to_cos", "dropout", "time_embedding_dim",
    )  # fmt: skip
    return config | {name: arguments[name] for name in same if arguments.get(name) is not None}


def first_stage_config(model: DiffusionModel) -> dict[str, Any]:
    """``config.json`` of a ``VQModel`` or ``AutoencoderKL``."""
    stage = model.architecture["first_stage"]
    arguments, (_, class_name) = stage["args"], _first_stage_of(stage)
    levels = range(len(arguments["block_out_channels"]))
    downs = set(arguments.get("encoder_attention_levels", ()))
    ups = set(arguments.get("decoder_attention_levels", ()))
    same = (
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels",
        "norm_num_groups",
    )  # fmt: skip
    config = {
        "_class_name": class_name,
        "sample_size": model.sample_shape[1] * 2 ** (len(levels) - 1),
        **{name: arguments[name] for name in same if name in arguments},
        "down_block_types": [_type("DownEncoder", i, downs, set()) for i in levels],
        "up_block_types": [_type("UpDecoder", i, ups, set()) for i in reversed(levels)],
        "mid_block_add_attention": arguments.get("mid_attention", True),
        "scaling_factor": model.scale_factor,
    }
    if class_name == "VQModel":
        return config | {"vq_embed_dim": arguments["embed_dim"], "num_vq_embeddings": arguments["n_embed"]}
    quant = {"use_quant_conv": "quant_conv", "use_post_quant_conv": "post_quant_conv"}
    return config | {theirs: arguments.get(ours, True) for theirs, ours in quant.items()}


def scheduler_config(model: DiffusionModel) -> dict[str, Any]:
    """``scheduler_config.json``.

    Raises:
        BidmError: a convention of sampling that diffusers has not.
    """
    convention, described = model.convention, model.schedule.description
    if convention.spacing not in ("leading", "linspace", "trailing") or convention.clip == "rederive":
        raise BidmError("the model's sampling convention is none of diffusers'")
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": model.schedule.timesteps,
        "prediction_type": _PREDICTIONS[model.prediction],
        "clip_sample": convention.clip == "keep_eps",
        "set_alpha_to_one": convention.final_alpha == "one",
        "steps_offset": convention.steps_offset,
        "timestep_spacing": convention.spacing,
        "variance_type": _VARIANCES.get(convention.variance, "fixed_small"),
    }
    kind = described["kind"]
    if kind not in _SCHEDULES:
        return config | {"trained_betas": model.schedule.betas.tolist()}
    config["beta_schedule"] = _SCHEDULES[kind]
    if kind != "cosine":
        config |= {"beta_start": described["start"], "beta_end": described["end"]}
    return config


def _first_stage_of(stage: dict[str, Any]) -> tuple[str, str]:
    """(subfolder, class) of a first stage."""
    if stage["kind"] not in _FIRST_STAGES:
        raise BidmError("the model's first stage is CompVis', which cannot be exported to diffusers")
    return _FIRST_STAGES[stage["kind"]]


def _type(way: str, level: int, attention: set[int], resnets: set[int]) -> str:
    if level in attention:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if level in resnets else f"{way}Block2D"


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode()
