"""A diffusers folder: ``model_index.json``, unet/, vae/ or vqvae/, scheduler/."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
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
_VARIANCES = {"small": "fixed_small", "large": "fixed_large"}
_VARIANCES |= {name: name for name in ("learned_range", "learned")}
_FIRST_STAGES = {"diffusers_vq": ("vqvae", "VQModel"), "diffusers_kl": ("vae", "AutoencoderKL")}


def export_folder(model: DiffusionModel, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Write the folder; returns its ``unet/config.json``.

    Raises:
        BidmError: a network or first stage that is not diffusers' own, a setting its files cannot say, a file
            in the way, or no place to write.
    """
    kind = model.architecture["unet"]["kind"]
    if kind not in _UNETS:
        raise BidmError(
            "the file keeps its UNet2DConditionModel under LDM's names, as earlier versions did; that "
            "cannot be exported to diffusers; compress the original again"
        )
    class_name, unet_config = _UNETS[kind]
    if folder.exists() and not folder.is_dir():
        raise BidmError(f"{folder} is a file; a diffusers model is a folder, name another one")
    pipeline = "DDIMPipeline" if kind == "diffusers_unet" else "DiffusionPipeline"
    index = {"_class_name": pipeline, "unet": ["diffusers", class_name]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    parts = [("unet", unet_config(model), dict(weights))]
    stage = model.architecture.get("first_stage")
    if stage is not None:
        name, stage_class = _first_stage_of(stage)
        if kind == "diffusers_unet":
            index["_class_name"] = "LDMPipeline"
        index[name] = ["diffusers", stage_class]
        if model.first_stage is not None:
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
    levels = len(arguments["block_out_channels"])
    downs, ups = arguments.get("attention_levels", ()), arguments.get("up_attention_levels")
    ups = downs if ups is None else ups
    groups = arguments.get("mid_attention_groups")
    if groups is None and arguments.get("film", False) and arguments.get("mid_attention_norm", True):
        groups = arguments.get("norm_num_groups", 32)
    config = _common_config(model, "UNet2DModel") | {
        "layers_per_block": arguments.get("layers_per_block", 2),
        "down_block_types": _block_types("Down", _self_attention(downs, levels), arguments),
        "up_block_types": _block_types("Up", _self_attention(ups, levels), arguments)[::-1],
        "downsample_type": "resnet" if {*downs} & {*arguments.get("resnet_down_levels", ())} else "conv",
        "upsample_type": "resnet" if {*ups} & {*arguments.get("resnet_up_levels", ())} else "conv",
        "add_attention": arguments.get("mid_attention", True),
        "mid_block_type": "UNetMidBlock2D" if arguments.get("mid_block", True) else None,
        "attention_head_dim": arguments.get("attention_head_dim", 8),
        "attn_norm_num_groups": groups,
    }
    if arguments.get("learned_times") is not None:
        config |= {"time_embedding_type": "learned", "num_train_timesteps": arguments["learned_times"]}
    return config


def condition_unet_config(model: DiffusionModel) -> dict[str, Any]:
    """``config.json`` of a ``UNet2DConditionModel``."""
    arguments = model.architecture["unet"]["args"]
    middles = {"cross": "UNetMidBlock2DCrossAttn", "plain": "UNetMidBlock2D", None: None}
    up_depth = arguments.get("up_transformer_depth")
    return _common_config(model, "UNet2DConditionModel") | {
        "layers_per_block": arguments["layers_per_block"],
        "down_block_types": _block_types("Down", arguments["down_attention"], arguments),
        "up_block_types": _block_types("Up", arguments["up_attention"], arguments)[::-1],
        "mid_block_type": middles[arguments.get("mid_block", "cross")],
        "attention_head_dim": arguments["num_heads"],
        "cross_attention_dim": arguments["context_dim"] or 1280,
        "transformer_layers_per_block": arguments.get("transformer_depth") or 1,
        "reverse_transformer_layers_per_block": up_depth[::-1] if up_depth else None,
        "only_cross_attention": arguments.get("only_cross") or False,
        "use_linear_projection": arguments.get("linear_projection", False),
        "conv_in_kernel": arguments.get("conv_in_kernel", 3),
        "conv_out_kernel": arguments.get("conv_out_kernel", 3),
    }


def _common_config(model: DiffusionModel, class_name: str) -> dict[str, Any]:
    """Settings that both classes call the same."""
    arguments = model.architecture["unet"]["args"]
    same = (
        "in_channels", "out_channels", "block_out_channels", "downsample_padding", "norm_num_groups",
        "norm_eps", "freq_shift", "flip_sin_to_cos", "dropout", "time_embedding_dim",
    )  # fmt: skip
    return {
        "_class_name": class_name,
        "sample_size": list(model.sample_shape[1:]),
        "resnet_time_scale_shift": "scale_shift" if arguments.get("film", False) else "default",
        "mid_block_scale_factor": arguments.get("mid_scale", 1.0),
        "center_input_sample": arguments.get("center_input", False),
        "class_embed_type": "timestep" if arguments.get("class_times", False) else None,
        "num_class_embeds": arguments.get("num_classes"),
        **{name: arguments[name] for name in same if arguments.get(name) is not None},
    }


_UNETS = {
    "diffusers_unet": ("UNet2DModel", unet_config),
    "diffusers_condition_unet": ("UNet2DConditionModel", condition_unet_config),
}


def first_stage_config(model: DiffusionModel) -> dict[str, Any]:
    """``config.json`` of a ``VQModel`` or ``AutoencoderKL``."""
    stage = model.architecture["first_stage"]
    arguments, (_, class_name) = stage["args"], _first_stage_of(stage)
    levels = len(arguments["block_out_channels"])
    downs = _self_attention(arguments.get("encoder_attention_levels", ()), levels)
    ups = _self_attention(arguments.get("decoder_attention_levels", ()), levels)
    same = (
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels",
        "norm_num_groups",
    )  # fmt: skip
    config = {
        "_class_name": class_name,
        "sample_size": model.sample_shape[1] * 2 ** (levels - 1),
        **{name: arguments[name] for name in same if name in arguments},
        "down_block_types": _block_types("DownEncoder", downs, {}),
        "up_block_types": _block_types("UpDecoder", ups, {})[::-1],
        "mid_block_add_attention": arguments.get("mid_attention", True),
        "scaling_factor": model.scale_factor,
    }
    if class_name == "VQModel":
        return config | {"vq_embed_dim": arguments["embed_dim"], "num_vq_embeddings": arguments["n_embed"]}
    quant = {"use_quant_conv": "quant_conv", "use_post_quant_conv": "post_quant_conv"}
    statistics = {name: arguments[name] for name in ("latents_mean", "latents_std") if arguments.get(name)}
    return config | statistics | {theirs: arguments.get(ours, True) for theirs, ours in quant.items()}


def scheduler_config(model: DiffusionModel) -> dict[str, Any]:
    """``scheduler_config.json``."""
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
        "clip_sample_range": convention.clip_range,
        "sample_max_value": convention.threshold_max,
        "thresholding": convention.threshold_quantile is not None,
    }
    if convention.threshold_quantile is not None:
        config["dynamic_thresholding_ratio"] = convention.threshold_quantile
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


def _self_attention(attended: Collection[int], levels: int) -> list[str]:
    """Kind of attention of each level."""
    return ["self" if level in attended else "none" for level in range(levels)]


def _block_types(way: str, attention: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
    """Block type of each level, finest first; ``way`` is "Down", "Up" or a first stage's."""
    resnets, words = arguments.get(f"resnet_{way.lower()}_levels", ()), {"cross": "CrossAttn", "self": "Attn"}
    return [
        f"Resnet{way}sampleBlock2D"
        if level in resnets and kind == "none"
        else f"{words.get(kind, '')}{way}Block2D"
        for level, kind in enumerate(attention)
    ]


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode()
