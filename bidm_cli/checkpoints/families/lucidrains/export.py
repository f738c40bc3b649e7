"""Export to a file of denoising-diffusion-pytorch's trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bidm_cli.checkpoints.exporting import write_checkpoint
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError

_WRAPPED_ATTENTION = "1.7.3"
"""lucidrains' version with averaging linear attention and plain convs; its attentions lie in two wrappers."""
_ATTENTION = re.compile(r"^((?:downs|ups)\.\d+\.2|mid_attn)\.(.+)$")


def write_trainer_file(model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
    """Write a trainer's file with its buffers, and JSON of the arguments of Unet and GaussianDiffusion.

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
    version = _version(arguments)
    if version == _WRAPPED_ATTENTION:
        weights = {_ATTENTION.sub(_wrapped, name): tensor for name, tensor in weights.items()}
    objective = {"epsilon": "pred_noise", "x0": "pred_x0", "v": "pred_v"}[model.prediction]
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    tensors |= {name: tensor.float() for name, tensor in _buffers(model).items()}
    same = ("dim", "init_dim", "dim_mults", "channels", "out_dim", "self_condition", "full_attn",
            "attn_heads", "attn_dim_head", "dropout")  # fmt: skip
    unet = {name: arguments[name] for name in same if name in arguments} | {
        "num_mem_kv": arguments["mem_kv"],
        "resnet_block_groups": arguments.get("groups", 8),
        "sinusoidal_pos_emb_theta": arguments.get("theta", 10000),
        "learned_variance": arguments["out_dim"] == 2 * arguments["channels"],
    }
    diffusion = {"image_size": list(model.sample_shape[1:]), "objective": objective}
    content = {"step": 0, "model": tensors, "version": version}
    return write_checkpoint(path, content, {"unet": unet, "diffusion": diffusion})


def _buffers(model: DiffusionModel) -> dict[str, Tensor]:
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


def _version(arguments: Mapping[str, Any]) -> str:
    """A version whose network computes this: names are those of its Unet."""
    if arguments["norm"] == "rms":
        return "2.0.0"
    if arguments.get("average"):
        return _WRAPPED_ATTENTION
    return "1.9.0" if arguments["mem_kv"] else "1.8.0"


def _wrapped(match: re.Match[str]) -> str:
    return f"{match[1]}.fn.{'' if match[2] == 'norm.g' else 'fn.'}{match[2]}"
