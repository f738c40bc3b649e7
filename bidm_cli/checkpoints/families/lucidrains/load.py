"""lucidrains/denoising-diffusion-pytorch: a trainer's model-N.pt, a GaussianDiffusion's or the U-Net's state
dict alone, and JSON of constructor arguments.

A trainer's file holds the diffusion's buffers, so schedule and objective need no guess: the loss weights are
1 for noise, alpha-bar for v and alpha-bar / (1 - alpha-bar) for x0. Sampling clips x0 and takes the noise
from the clipped x0; images are kept in [-1, 1] here, where the original maps them to [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed
from bidm_cli.checkpoints.exporting import word_for, write_checkpoint
from bidm_cli.checkpoints.families.lucidrains.unet import (
    TOO_OLD,
    as_later,
    era_of,
    infer_lucidrains_unet,
    lucidrains_unet_arguments,
)
from bidm_cli.checkpoints.overrides import PREDICTIONS
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.checkpoints.reading.schedules import one_line, schedule_from_buffers
from bidm_cli.checkpoints.reading.state import Weights, shapes_of, with_prefix
from bidm_cli.checkpoints.value_range import Range, value_range
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

Prediction = Literal["epsilon", "x0", "v"]
_OBJECTIVES: dict[str, Prediction] = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
_WRAPPED_ATTENTION = "1.7.3"
"""lucidrains' version with averaging linear attention and plain convs; its attentions lie in two wrappers."""
_ATTENTION = re.compile(r"^((?:downs|ups)\.\d+\.2|mid_attn)\.(.+)$")
_OVERRIDE = "override with `config` or `settings`"
_OF_DIFFUSION = {
    "image_size", "timesteps", "sampling_timesteps", "objective", "beta_schedule", "schedule_fn_kwargs",
    "ddim_sampling_eta", "auto_normalize", "offset_noise_strength", "min_snr_loss_weight", "min_snr_gamma",
    "immiscible", "loss_type", "p2_loss_weight_gamma", "p2_loss_weight_k",
}  # fmt: skip
"""Arguments of GaussianDiffusion; those that bidm does not read are for its loss or its own sampling."""


@dataclass(frozen=True)
class LucidrainsSettings(base.NetworkSettings):
    """Settings of a configuration (``options`` are the constructor's), and the file's diffusion buffers."""

    options: Section = field(default_factory=lambda: Section({}, ""))
    image_size: tuple[int, int] | None = None
    schedule: NoiseSchedule | None = None
    prediction: Prediction | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


@base.register_family
class Lucidrains(base.OneNetworkFamily[LucidrainsSettings]):
    """lucidrains/denoising-diffusion-pytorch, version 0.30 and later."""

    signature = base.Signature(
        "lucidrains",
        "lucidrains/denoising-diffusion-pytorch",
        (
            ("model.init_conv.weight", "model.time_mlp.1.weight", "model.final_conv.weight"),
            ("denoise_fn.init_conv.weight", "denoise_fn.time_mlp.1.weight", "denoise_fn.final_conv.weight"),
            ("ema_model.model.init_conv.weight", "ema_model.model.final_conv.weight"),
            ("init_conv.weight", "time_mlp.1.weight", "mid_attn.to_out.weight", "final_conv.weight"),
        ),
    )
    network_kind = "lucidrains_unet"
    exports_value_range = True
    assumed_version = "version 2.x"

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        return "arguments" if {"dim_mults", "dim"} & base.network_section(values).keys() else None

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        settings = LucidrainsSettings() if config is None else self.read_settings(config)
        notes.extend(settings.notes)
        choice = base.choose_weights(detected.weights, ema, notes, source=source)
        unet, buffers = _unet_of(choice.weights.tensors), _buffers_beside(detected.weights)
        version = str(detected.settings.get("version", "")) or _version(detected.contents, config)
        era = era_of(unet, version)
        tensors = as_later(unet, era)
        said = f" and version {version}" if version else ""
        notes.append(f"version {era.name} of the code, by its names{said}")
        arguments = infer_lucidrains_unet(shapes_of(tensors), settings.options, era)
        if config is not None:
            base.check_agreement(settings.options, arguments, ("dim", "dim_mults", "channels"))
        notes.append("architecture inferred from names and shapes")
        if not arguments["mem_kv"] and "attn_dim_head" not in settings.options:
            reason = "assumed, the code's default; override with `config`"
            notes.append(assumed(f"attention heads: 32 channels each ({reason})"))
        about: dict[str, Any] = {"source": source, "ema": choice.averaged}
        spare = {name.removeprefix("model.") for name in choice.spare}
        found = self.built(arguments, tensors, notes, ignored=spare, **about)
        checkpoint = self.assemble(replace(settings, buffers=buffers), found)
        asked = PREDICTIONS.get(str(detected.settings.get("prediction")), checkpoint.prediction)
        if "p2_loss_weight" in buffers and asked == "epsilon":
            # Before 1.5, DDIM went on with the noise as predicted.
            checkpoint.convention = replace(checkpoint.convention, clip="keep_eps")
        return checkpoint

    def bare_arguments(self, config: Config, settings: LucidrainsSettings) -> dict[str, Any]:
        return lucidrains_unet_arguments(settings.options)

    def assemble(self, settings: LucidrainsSettings, found: base.Found) -> Checkpoint:
        arguments, notes = found.arguments, found.notes
        schedule, reason = _schedule(settings.buffers, settings)
        line = f"schedule: {one_line(schedule)} ({reason})"
        notes.append(assumed(line) if reason.startswith("assumed") else line)
        learned = arguments["out_dim"] == 2 * arguments["channels"]
        prediction = _prediction(settings.buffers, settings, learned, notes)
        size = settings.image_size or (128, 128)
        if settings.image_size is None:
            reason = "assumed, as in the original's instructions: no file of this family says it"
            notes.append(assumed(f"size {size[0]}x{size[1]} ({reason}; {_OVERRIDE} image_size=N)"))
        cell = 2 ** (len(arguments["dim_mults"]) - 1)
        if size[0] % cell or size[1] % cell:
            raise BidmError(
                f"images of {size[0]}x{size[1]} do not fit this U-Net; both sides must be multiples of {cell}"
            )
        if not learned and arguments["out_dim"] != arguments["channels"]:
            raise BidmError(
                f"a network of {arguments['channels']} channels in and {arguments['out_dim']} out is no "
                "diffusion model of this family that bidm has (WeightedObjectiveGaussianDiffusion has two "
                "channels more than twice as many)"
            )
        if arguments["self_condition"]:
            notes.append(
                "self-conditioning: each step is also given the x0 of the step before (packed: zeros instead)"
            )
        return self.pixel_checkpoint(
            settings,
            found,
            sample_shape=(arguments["channels"], *size),
            schedule=schedule,
            convention=SamplingConvention(
                spacing="lucidrains",
                clip="rederive",
                clip_ancestral=True,
                variance="learned_range" if learned else "small",
            ),
            prediction=prediction,
        )

    def read_settings(self, config: Config) -> LucidrainsSettings:
        """JSON with the arguments of Unet and GaussianDiffusion, nested or flat."""
        root = config.root
        nested = "unet" in root or "diffusion" in root
        unet, diffusion = (root.section("unet"), root.section("diffusion")) if nested else (root, root)
        objective = diffusion.get("objective", None)
        if objective is not None and objective not in _OBJECTIVES:
            raise diffusion.wrong("objective", ", ".join(_OBJECTIVES), objective)
        return LucidrainsSettings(
            options=unet,
            image_size=first(Section.sides, (diffusion, "image_size"), (root, "image_size")),
            schedule=_configured_schedule(diffusion),
            prediction=_OBJECTIVES.get(str(objective)),
            value_range=_value_range(diffusion),
            notes=tuple(base.unknown_in(diffusion, _OF_DIFFUSION)) if nested else (),
        )

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write a trainer's file with its buffers, and JSON of the arguments of Unet and GaussianDiffusion.

        Raises:
            BidmError: a network from before 1.7, where every conv of a block standardizes its weights: those
                of a binary one cannot be given as what they become.
        """
        arguments = model.architecture["unet"]["args"]
        if arguments["attention_norm"] != "rms" or arguments.get("strided"):
            raise BidmError(
                "the network is of a version of denoising-diffusion-pytorch before 1.7, which standardizes "
                "the convs' weights as it runs: no file of it can hold binary weights"
            )
        version = _export_version(arguments)
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
        word_for(str(value_range(model)), {"None": True, "unit": False}, "range of values")
        diffusion = {"image_size": list(model.sample_shape[1:]), "objective": objective}
        normalized = {} if value_range(model) is None else {"auto_normalize": False}
        content = {"step": 0, "model": tensors, "version": version}
        return write_checkpoint(path, content, {"unet": unet, "diffusion": diffusion | normalized})


def _value_range(diffusion: Section) -> tuple[Range, str] | None:
    """Images are in [0, 1] as they are read, and in [-1, 1] with ``auto_normalize``, the default."""
    if diffusion.flag("auto_normalize", True):
        return None
    return "unit", f"auto_normalize false in {diffusion.where}"


def _buffers_beside(found: list[Weights]) -> dict[str, Tensor]:
    """The diffusion's buffers, those beside the trained weights first: averaging passes over buffers, too."""
    diffusion = next((weights for weights in found if not weights.is_average), found[0])
    return {name: tensor for name, tensor in diffusion.tensors.items() if "." not in name}


def _version(contents: Any, config: Config | None) -> str | None:
    """The version of the code, as configured or as a trainer's file says."""
    if config is not None and isinstance(config.root.values.get("version"), str):
        return config.root.text("version")
    said = contents.get("version") if isinstance(contents, Mapping) else None
    return printable(said, 20) if isinstance(said, str) else None


def _unet_of(diffusion: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's tensors in a GaussianDiffusion's (``model.*``), or in the U-Net's own state dict."""
    if any(name.startswith("denoise_fn.") for name in diffusion):
        raise BidmError(
            "a model of denoising-diffusion-pytorch before 2022-07 (names such as denoise_fn.init_conv); "
            + TOO_OLD
        )
    return with_prefix(diffusion, "model.") or dict(diffusion)


def _schedule(buffers: Mapping[str, Tensor], settings: LucidrainsSettings) -> tuple[NoiseSchedule, str]:
    found = schedule_from_buffers(buffers, settings.schedule)
    if found is not None:
        return found
    if settings.schedule is not None:
        return settings.schedule, "from the configuration"
    return NoiseSchedule.sigmoid(1000), f"assumed, the default of version 2.x; {_OVERRIDE} beta_schedule=..."


def _prediction(
    buffers: Mapping[str, Tensor], settings: LucidrainsSettings, learned: bool, notes: list[str]
) -> Prediction:
    """Prediction of the network: as configured, as the loss weights tell, or the code's default.

    With a learned variance it is the noise: LearnedGaussianDiffusion passes over objective and loss weights.
    """
    if learned:
        said = settings.prediction not in (None, "epsilon")
        rest = (
            f"; the objective {settings.prediction} of the configuration counts for nothing there"
            if said
            else ""
        )
        notes.append(
            f"predicts epsilon (twice the channels out are LearnedGaussianDiffusion's{rest}; override with "
            "`settings` prediction=v)"
        )
        return "epsilon"
    weighted = objective_of(buffers)
    prediction: Prediction = settings.prediction or weighted or "v"
    if settings.prediction is not None:
        reason = "from the configuration"
        if weighted not in (None, settings.prediction):
            reason += f"; the loss weights say {weighted}"
    elif weighted is not None:
        reason = "by the loss weights in the file"
    elif "p2_loss_weight" in buffers:
        prediction = "epsilon"
        reason = f"assumed, the default of the time of p2_loss_weight; {_OVERRIDE} prediction=v"
    else:
        reason = f"assumed, the default of version 2.x; {_OVERRIDE} prediction=epsilon"
    line = f"predicts {prediction} ({reason})"
    notes.append(assumed(line) if reason.startswith("assumed") else line)
    return prediction


def objective_of(buffers: Mapping[str, Tensor]) -> Prediction | None:
    """Prediction of the network, by the buffer ``loss_weight``; None without it or if it fits nothing.

    With r = alpha-bar / (1 - alpha-bar), perhaps limited (min-SNR, arXiv 2303.09556), the weights are r / r
    for noise, r for x0 and r / (r + 1) for v; only r in the numerator is limited.
    """
    weight, alphas = buffers.get("loss_weight"), buffers.get("alphas_cumprod")
    if weight is None or alphas is None or weight.shape != alphas.shape:
        return None
    if weight.dim() != 1 or not len(weight):
        return None
    weight, alphas = weight.double(), alphas.double()
    ratio = alphas / (1 - alphas)
    divisors: dict[Prediction, Tensor] = {"epsilon": ratio, "v": ratio + 1, "x0": torch.ones_like(ratio)}
    for prediction, divisor in divisors.items():
        limit = weight[0] * divisor[0]
        # Loosely: float32 alpha-bars near 1 have lost most of 1 - alpha-bar.
        if torch.allclose(torch.minimum(ratio, limit) / divisor, weight, rtol=0.05, atol=0):
            return prediction
    return None


def _configured_schedule(diffusion: Section) -> NoiseSchedule | None:
    """The schedule of the constructor's arguments; None if they say nothing of it."""
    if not any(name in diffusion for name in ("timesteps", "beta_schedule", "schedule_fn_kwargs")):
        return None
    kind, timesteps = diffusion.text("beta_schedule", "sigmoid"), diffusion.integer("timesteps", 1000)
    if not 2 <= timesteps <= 100_000:
        raise diffusion.wrong("timesteps", "2 to 100000", timesteps)
    extra = diffusion.section("schedule_fn_kwargs")
    if kind == "linear":
        return NoiseSchedule.linear(timesteps, 0.1 / timesteps, min(20 / timesteps, 0.999))
    if kind == "cosine":
        return NoiseSchedule.cosine(timesteps, extra.number("s", 0.008))
    if kind == "sigmoid":
        numbers = [extra.number(name, default) for name, default in (("start", -3), ("end", 3), ("tau", 1))]
        if not numbers[0] < numbers[1] or not numbers[2] > 0:
            raise diffusion.wrong("schedule_fn_kwargs", "start below end and tau above 0", extra.values)
        return NoiseSchedule.sigmoid(timesteps, *numbers)
    raise diffusion.wrong("beta_schedule", "sigmoid, cosine or linear", kind)


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


def _export_version(arguments: Mapping[str, Any]) -> str:
    """A version whose network computes this: names are those of its Unet."""
    if arguments["norm"] == "rms":
        return "2.0.0"
    if arguments.get("average"):
        return _WRAPPED_ATTENTION
    return "1.9.0" if arguments["mem_kv"] else "1.8.0"


def _wrapped(match: re.Match[str]) -> str:
    return f"{match[1]}.fn.{'' if match[2] == 'norm.g' else 'fn.'}{match[2]}"
