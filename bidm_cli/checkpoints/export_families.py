"""What the other families' files and configurations hold, in the words of their projects.

Each function gives (content of the checkpoint, configuration) for weights in the original layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

Weights = Mapping[str, Tensor]
Exported = tuple[Any, dict[str, Any]]
_TWO_VARIANCES = ("small", "large")
_WRAPPED_ATTENTION = "1.7.3"
"""lucidrains' version with averaging linear attention and plain convs; its attentions lie in two wrappers."""
_ATTENTION = re.compile(r"^((?:downs|ups)\.\d+\.2|mid_attn)\.(.+)$")


def openai(model: DiffusionModel, weights: Weights) -> Exported:
    """A bare state dict, and JSON of the constructors' arguments.

    Raises:
        BidmError: a schedule or prediction that OpenAI's code has not.
    """
    timesteps, scale = model.schedule.timesteps, 1000 / model.schedule.timesteps
    kinds = {
        "linear": NoiseSchedule.linear(timesteps, scale * 1e-4, min(scale * 0.02, 0.999)),
        "cosine": NoiseSchedule.cosine(timesteps),
    }
    diffusion = {
        "steps": timesteps,
        "noise_schedule": _name_of(model, kinds),
        "predict_xstart": _word(model.prediction, {"epsilon": False, "x0": True}, "prediction"),
        "sigma_small": model.convention.variance == "small",
        "learn_sigma": model.convention.variance == "learned_range",
        "rescale_timesteps": model.time_scale != 1.0,
    }
    arguments = model.architecture["unet"]["args"]
    unet = {key: value for key, value in arguments.items() if value is not None}
    return dict(weights), {
        "library": "guided", "unet": unet, "diffusion": diffusion, "image_size": _side(model),
    }  # fmt: skip


def w86763777(model: DiffusionModel, weights: Weights) -> Exported:
    """``net_model`` and ``ema_model``, the noise that tells the image size, and JSON of the flags.

    Raises:
        BidmError: a schedule or prediction that the original has not.
    """
    start, end = _ends(model)
    arguments = model.architecture["unet"]["args"]
    noise = torch.zeros(1, *model.sample_shape)
    config = {
        "unet": {
            "T": model.schedule.timesteps,
            "ch": arguments["ch"],
            "ch_mult": list(arguments["ch_mult"]),
            "attn": list(arguments["attention_levels"]),
            "num_res_blocks": arguments["num_res_blocks"],
            "dropout": arguments.get("dropout", 0.0),
        },
        "diffusion": {
            "beta_1": start,
            "beta_T": end,
            "var_type": f"fixed{_one_of(model.convention.variance, _TWO_VARIANCES, 'variance')}",
            "mean_type": _word(model.prediction, {"epsilon": "epsilon", "x0": "xstart"}, "prediction"),
        },
        "img_size": _side(model),
    }
    return {"net_model": dict(weights), "ema_model": dict(weights), "step": 0, "x_T": noise}, config


def dit(model: DiffusionModel, weights: Weights) -> Exported:
    """A bare state dict, as the released files, and JSON of the constructor's arguments.

    Raises:
        BidmError: another schedule or prediction than DiT's.
    """
    _name_of(model, {"linear": NoiseSchedule.linear(1000, 1e-4, 0.02)})
    _one_of(model.prediction, ("epsilon",), "prediction")
    arguments = model.architecture["unet"]["args"]
    has_null = model.null_label is not None
    return dict(weights), {
        "input_size": arguments["input_size"],
        "patch_size": arguments["patch_size"],
        "in_channels": arguments["in_channels"],
        "hidden_size": arguments["hidden_size"],
        "depth": arguments["depth"],
        "num_heads": arguments["num_heads"],
        "mlp_ratio": arguments["mlp_width"] / arguments["hidden_size"],
        "class_dropout_prob": 0.1 if has_null else 0.0,
        "num_classes": arguments["label_rows"] - has_null,
        "learn_sigma": arguments["out_channels"] == 2 * arguments["in_channels"],
    }


def uvit(model: DiffusionModel, weights: Weights) -> Exported:
    """A bare state dict (``nnet_ema.pth``), and JSON of the constructor's arguments."""
    _one_of(model.prediction, ("epsilon",), "prediction")
    arguments = model.architecture["unet"]["args"]
    rows = arguments.get("label_rows")
    same = ("img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "qkv_bias", "mlp_time_embed")
    context = {}
    if arguments.get("context_dim") is not None:
        context = {"clip_dim": arguments["context_dim"], "num_clip_token": arguments["context_tokens"]}
    return dict(weights), context | {
        **{name: arguments[name] for name in same if name in arguments},
        "depth": 2 * arguments["half_depth"] + 1,
        "mlp_ratio": arguments["mlp_width"] / arguments["embed_dim"],
        "num_classes": -1 if rows is None else rows,
        "null_label": model.null_label is not None,
        "conv": arguments.get("conv", True),
        "skip": arguments.get("skip", True),
    }


def score_sde(model: DiffusionModel, weights: Weights) -> Exported:
    """``model`` and ``ema`` of a checkpoint_N.pth, and JSON with the original configuration's sections.

    Raises:
        BidmError: a schedule or prediction that the original has not.
    """
    _one_of(model.prediction, ("epsilon",), "prediction")
    start, end = _ends(model)
    arguments, timesteps = model.architecture["unet"]["args"], model.schedule.timesteps
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".NIN_" not in name:
            named[name] = tensor
        elif name.endswith(".bias"):
            named[name.replace(".bias", ".b")] = tensor
        else:
            named[name.replace(".weight", ".W")] = tensor.flatten(1).T.contiguous()
    content = {"model": {f"module.{name}": tensor for name, tensor in named.items()}, "step": 0}
    content["ema"] = {"decay": 0.9999, "num_updates": 0, "shadow_params": list(named.values())}
    plain = arguments.get("norm_groups") is not None
    size = _side(model)
    network = {
        "name": "ddpm" if plain else "ncsnpp",
        "nf": arguments["ch"],
        "ch_mult": list(arguments["ch_mult"]),
        "num_res_blocks": arguments["num_res_blocks"],
        "attn_resolutions": [size // 2**level for level in arguments["attention_levels"]],
        "resblock_type": arguments["kind"],
        "progressive_input": "residual" if arguments.get("input_pyramid") else "none",
        **{key: arguments.get(key, False) for key in ("skip_rescale", "fir")},
        "resamp_with_conv": arguments.get("resamp_with_conv", True),
        "dropout": arguments.get("dropout", 0.0),
        "num_scales": timesteps,
        "beta_min": start * timesteps,
        "beta_max": end * timesteps,
    }
    return content, {
        "model": network,
        "data": {"image_size": size, "num_channels": arguments["in_channels"], "centered": True},
        "training": {"sde": "vpsde", "continuous": model.time_scale != 1.0},
    }


def lucidrains(model: DiffusionModel, weights: Weights) -> Exported:
    """A trainer's file with its buffers, and JSON of the arguments of Unet and GaussianDiffusion.

    Raises:
        BidmError: a network from before 1.7, where every conv of a block standardizes its weights: those of
            a binary one cannot be given as what they become.
    """
    arguments = model.architecture["unet"]["args"]
    if arguments["attention_norm"] != "rms" or arguments.get("strided"):
        raise BidmError(
            "the network is of a version of denoising-diffusion-pytorch before 1.7, which standardizes the "
            "convs' weights as it runs: no file of it can hold binary weights"
        )
    version = _lucidrains_version(arguments)
    if version == _WRAPPED_ATTENTION:
        weights = {_ATTENTION.sub(_wrapped, name): tensor for name, tensor in weights.items()}
    objective = {"epsilon": "pred_noise", "x0": "pred_x0", "v": "pred_v"}[model.prediction]
    content = {f"model.{name}": tensor for name, tensor in weights.items()}
    content |= {name: tensor.float() for name, tensor in _lucidrains_buffers(model).items()}
    same = ("dim", "init_dim", "dim_mults", "channels", "out_dim", "self_condition", "full_attn",
            "attn_heads", "attn_dim_head", "dropout")  # fmt: skip
    unet = {name: arguments[name] for name in same if name in arguments} | {
        "num_mem_kv": arguments["mem_kv"],
        "resnet_block_groups": arguments.get("groups", 8),
        "sinusoidal_pos_emb_theta": arguments.get("theta", 10000),
        "learned_variance": arguments["out_dim"] == 2 * arguments["channels"],
    }
    diffusion = {"image_size": list(model.sample_shape[1:]), "objective": objective}
    return {"step": 0, "model": content, "version": version}, {"unet": unet, "diffusion": diffusion}


def _lucidrains_buffers(model: DiffusionModel) -> dict[str, Tensor]:
    """All that GaussianDiffusion keeps for each timestep; loss weights without min-SNR."""
    betas, after = model.schedule.betas, model.schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=after.dtype), after[:-1]])
    ratio = after / (1 - after)
    posterior = betas * (1 - before) / (1 - after)
    return {
        "betas": betas,
        "alphas_cumprod": after,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": after.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - after).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - after).log(),
        "sqrt_recip_alphas_cumprod": after.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / after - 1).sqrt(),
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": posterior.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - after),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - after),
        "loss_weight": {"epsilon": ratio / ratio, "x0": ratio, "v": ratio / (ratio + 1)}[model.prediction],
    }


def _lucidrains_version(arguments: Mapping[str, Any]) -> str:
    """A version whose network computes this: names are those of its Unet."""
    if arguments["norm"] == "rms":
        return "2.0.0"
    if arguments.get("average"):
        return _WRAPPED_ATTENTION
    return "1.9.0" if arguments["mem_kv"] else "1.8.0"


def _wrapped(match: re.Match[str]) -> str:
    return f"{match[1]}.fn.{'' if match[2] == 'norm.g' else 'fn.'}{match[2]}"


def _side(model: DiffusionModel) -> int:
    _, height, width = model.sample_shape
    if height != width:
        raise BidmError(f"this layout has square images only, this model's are {height}x{width}")
    return height


def _ends(model: DiffusionModel) -> tuple[float, float]:
    described = model.schedule.description
    if described.get("kind") != "linear":
        raise BidmError(f"this layout cannot say a noise schedule of kind {described.get('kind')!r}")
    return described["start"], described["end"]


def _name_of(model: DiffusionModel, known: Mapping[str, NoiseSchedule]) -> str:
    """Which of these the model's schedule is."""
    for name, schedule in known.items():
        if torch.allclose(schedule.alphas_cumprod, model.schedule.alphas_cumprod, rtol=1e-6, atol=0):
            return name
    raise BidmError(f"this layout cannot say the model's noise schedule, only its own {' or '.join(known)}")


def _word(value: str, words: Mapping[str, Any], what: str) -> Any:
    return words[_one_of(value, tuple(words), what)]


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise BidmError(f"this layout cannot say the {what} {value!r}, only {' or '.join(known)}")
    return value
