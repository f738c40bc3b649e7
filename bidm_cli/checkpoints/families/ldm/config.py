"""What an LDM configuration says: CompVis' config.yaml, or JSON of constructor arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bidm_cli.checkpoints.families.ddpm_unet import ddpm_unet_arguments
from bidm_cli.checkpoints.families.ldm.upscaler import LowScale, read_low_scale
from bidm_cli.checkpoints.first_stages.compvis import Architecture, first_stage_from_config
from bidm_cli.checkpoints.reading.config import Config, Section
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

Prediction = Literal["epsilon", "x0", "v"]
_PREDICTIONS: dict[str, Prediction] = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "x0": "x0",
    "v": "v",
    "velocity": "v",
}

# Settings of the original constructor that change nothing in what the network computes.
_WITHOUT_EFFECT = {
    "image_size", "use_checkpoint", "use_fp16", "use_bf16", "dims", "legacy", "ckpt_path", "ignore_keys",
    "dtype", "fp16", "learn_sigma", "spatial_transformer_attn_type",
}  # fmt: skip

# What flat JSON may hold besides the network's arguments.
_OF_DIFFUSION = {
    "timesteps", "steps", "beta_schedule", "noise_schedule", "linear_start", "linear_end", "beta_start",
    "beta_end", "cosine_s", "parameterization", "scale_factor", "scale_by_std", "channels", "first_stage",
    "first_stage_config", "cond_stage_config", "conditioning_key", "diffusion", "library", "commit",
}  # fmt: skip


@dataclass(frozen=True)
class LDMSettings:
    """The settings bidm needs of an LDM configuration; None where it does not say.

    Attributes:
        first_stage: architecture, or None for an identity or none.
        conditioner: architecture of a class embedder, or of a rescaler of segmentation maps.
        conditioned_by: the conditioner's class name, "" if there is none.
        scale_by_std: the file has to hold the scale factor.
        latent: False for LDM's pixel models.
        low_scale: the noise on the small image of an upscaler.
    """

    unet: Architecture | None = None
    first_stage: Architecture | None = None
    conditioner: Architecture | None = None
    conditioned_by: str = ""
    conditioning_key: str | None = None
    schedule: NoiseSchedule | None = None
    prediction: Prediction | None = None
    scale_factor: float | None = None
    scale_by_std: bool = False
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    latent: bool = True
    low_scale: LowScale | None = None


def read_settings(config: Config) -> LDMSettings:
    """The settings of a configuration of the layout "ldm".

    Raises:
        BidmError: a setting is missing, of the wrong type, or of something bidm does not have.
    """
    if config.kind == "yaml":
        model = config.root.section("model")
        return _settings(model.section("params"), model.text("target", ""), complete=True)
    return _settings(_params_of_arguments(config.root), "", complete=False)


def _params_of_arguments(root: Section) -> Section:
    """JSON of constructor arguments in the shape of a config.yaml's ``model.params``."""
    values = dict(root.values)
    unet = values.pop("unet", None)
    if unet is None:
        unet = {name: value for name, value in values.items() if name not in _OF_DIFFUSION}
    diffusion = values.pop("diffusion", {})
    params = {**values, **(diffusion if isinstance(diffusion, dict) else {})}
    for ours, theirs in (
        ("timesteps", "steps"),
        ("beta_schedule", "noise_schedule"),
        ("linear_start", "beta_start"),
        ("linear_end", "beta_end"),
    ):
        if theirs in params and ours not in params:
            params[ours] = params.pop(theirs)
    params["unet_config"] = {"params": unet}
    if isinstance(params.get("first_stage"), dict):
        first_stage = params.pop("first_stage")
        params["first_stage_config"] = first_stage if "params" in first_stage else {"params": first_stage}
    return Section(params, root.where)


def _settings(params: Section, target: str, complete: bool) -> LDMSettings:
    """``complete``: absent settings have the original constructor's defaults (not so in partial JSON)."""
    image_size = _image_size(params)
    conditioner, conditioned_by = _conditioner(params)
    parameterization = params.text("parameterization", "eps")
    if parameterization not in _PREDICTIONS:
        raise params.wrong("parameterization", "eps, x0 or v", parameterization)
    first_stage = None
    if "first_stage_config" in params and not isinstance(params.get("first_stage_config"), str):
        first_stage = first_stage_from_config(params.section("first_stage_config"))
    says_schedule = complete or bool({"timesteps", "beta_schedule", "linear_start"} & params.values.keys())
    return LDMSettings(
        unet=unet_from_config(params.section("unet_config"), image_size),
        first_stage=first_stage,
        conditioner=conditioner,
        conditioned_by=conditioned_by,
        conditioning_key=params.get("conditioning_key", None),
        schedule=_schedule(params) if says_schedule else None,
        prediction=_PREDICTIONS[parameterization] if complete or "parameterization" in params else None,
        scale_factor=params.number("scale_factor", 1.0) if complete or "scale_factor" in params else None,
        scale_by_std=params.flag("scale_by_std", False),
        image_size=image_size,
        channels=params.integer("channels", 3) if complete or "channels" in params else None,
        latent=not target.endswith(".DDPM"),
        low_scale=read_low_scale(params),
    )


def _image_size(params: Section) -> tuple[int, int] | None:
    unet = params.section("unet_config").section("params")
    for section in (params, unet):
        if "image_size" in section:
            sides = section.numbers("image_size")
            if len(sides) not in (1, 2) or not all(isinstance(n, int) and 1 <= n <= 1 << 14 for n in sides):
                raise section.wrong("image_size", "one or two whole numbers", sides)
            return sides[0], sides[-1]
    return None


def _schedule(params: Section) -> NoiseSchedule:
    timesteps = params.integer("timesteps", 1000)
    kind = params.text("beta_schedule", "linear")
    ends = (params.number("linear_start", 1e-4), params.number("linear_end", 2e-2))
    if not 2 <= timesteps <= 100_000 or not 0 < ends[0] <= ends[1] < 1:
        raise BidmError(
            f"{params.where}: no noise schedule runs from {ends[0]} to {ends[1]} in {timesteps} steps"
        )
    if kind == "linear":
        return NoiseSchedule.scaled_linear(timesteps, *ends)
    if kind == "sqrt_linear":
        return NoiseSchedule.linear(timesteps, *ends)
    if kind == "cosine":
        return NoiseSchedule.cosine(timesteps, params.number("cosine_s", 8e-3))
    if kind == "sqrt":
        betas = NoiseSchedule.linear(timesteps, *ends).betas.sqrt()
        return NoiseSchedule.explicit((1 - betas).cumprod(0))
    raise params.wrong("beta_schedule", "linear, sqrt_linear, cosine or sqrt", kind)


def _conditioner(params: Section) -> tuple[Architecture | None, str]:
    """(architecture of a class embedder or rescaler or None, the conditioner's class name or "")."""
    value = params.get("cond_stage_config", "__is_unconditional__")
    if isinstance(value, str):
        return None, "" if value == "__is_unconditional__" else value.strip("_")
    section = params.section("cond_stage_config")
    name = section.text("target").rpartition(".")[2]
    if name == "SpatialRescaler":
        return {"kind": "spatial_rescaler", "args": _rescaler(section.section("params"))}, name
    if name != "ClassEmbedder":
        return None, name
    arguments = section.section("params")
    rows, width = arguments.integer("n_classes", 1000), arguments.integer("embed_dim")
    return {"kind": "class_embedder", "args": {"n_classes": rows, "embed_dim": width}}, name


def _rescaler(params: Section) -> dict[str, Any]:
    method, multiplier = params.text("method", "bilinear"), params.number("multiplier", 0.5)
    if method not in ("nearest", "bilinear", "bicubic", "area"):
        raise params.wrong("method", "nearest, bilinear, bicubic or area", method)
    if not 0 < multiplier <= 1:
        raise params.wrong("multiplier", "a number up to 1", multiplier)
    return {
        "n_stages": params.integer("n_stages", 1),
        "method": method,
        "multiplier": multiplier,
        "in_channels": params.integer("in_channels", 3),
        "out_channels": params.integer("out_channels") if "out_channels" in params else None,
        "bias": params.flag("bias", False),
    }


def unet_from_config(section: Section, image_size: tuple[int, int] | None) -> Architecture:
    """Architecture from ``unet_config``: CompVis' UNetModel, or its ``Model`` (the DDPM U-Net).

    Raises:
        BidmError: settings are missing, of the wrong type or unknown.
    """
    params = section.section("params")
    if "ch_mult" in params and "model_channels" not in params:
        size = params.integer("resolution", image_size[0] if image_size else None)
        return {"kind": "ddpm_unet", "args": ddpm_unet_arguments(params, size)}
    return {"kind": "ldm_unet", "args": _unet_arguments(params)}


def _unet_arguments(params: Section) -> dict[str, Any]:
    blocks = params.numbers("num_res_blocks")
    arguments: dict[str, Any] = {
        "in_channels": params.integer("in_channels"),
        "out_channels": params.integer("out_channels"),
        "model_channels": params.integer("model_channels"),
        "num_res_blocks": blocks[0] if len(blocks) == 1 else blocks,
        "channel_mult": params.numbers("channel_mult", [1, 2, 4, 8]),
        "attention_resolutions": params.numbers("attention_resolutions"),
        "dropout": params.number("dropout", 0.0),
    }
    for name, default in (
        ("conv_resample", True),
        ("use_scale_shift_norm", False),
        ("resblock_updown", False),
        ("use_new_attention_order", False),
        ("use_spatial_transformer", False),
        ("use_linear_in_transformer", False),
        ("disable_middle_self_attn", False),
    ):
        arguments[name] = params.flag(name, default)
    arguments |= _attention(params) | _attention_by_level(params)
    arguments |= _label_embedding(params)
    unknown = [name for name in params.values if name not in arguments and name not in _WITHOUT_EFFECT]
    unknown = [name for name in unknown if params.values[name] not in (None, False) and name != "context_dim"]
    if unknown or params.integer("dims", 2) != 2:
        raise BidmError(
            f"{params.where}: this U-Net has settings that bidm does not know: {', '.join(unknown) or 'dims'}"
        )
    return arguments


def _label_embedding(params: Section) -> dict[str, Any]:
    """Classes, or the Stability code's vectors: ``num_classes`` is then a word."""
    kind = params.get("num_classes", None)
    if kind == "sequential":
        return {"num_classes": None, "adm_in_channels": params.integer("adm_in_channels")}
    if kind == "continuous":
        return {"num_classes": None, "adm_in_channels": 1, "adm_layers": 1}
    return {} if kind is None else {"num_classes": params.integer("num_classes")}


def _attention_by_level(params: Section) -> dict[str, Any]:
    """Settings of the Stability code that give attention a resolution at a time, where they are set."""
    found: dict[str, Any] = {}
    if "num_attention_blocks" in params:
        found["num_attention_blocks"] = params.numbers("num_attention_blocks")
    if "disable_self_attentions" in params:
        flags = params.get("disable_self_attentions")
        if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
            raise params.wrong("disable_self_attentions", "a list of true and false", flags)
        found["disable_self_attentions"] = flags
    return found


def _attention(params: Section) -> dict[str, Any]:
    heads = {
        name: params.integer(name, -1) for name in ("num_heads", "num_head_channels", "num_heads_upsample")
    }
    if not params.flag("legacy", True):
        # The original then derives the heads of every layer from num_heads, the decoder's, too.
        heads["num_heads_upsample"] = -1
    if heads["num_heads"] == -1 and heads["num_head_channels"] == -1:
        raise BidmError(f"{params.where}: either num_heads or num_head_channels has to be set")
    if not params.flag("use_spatial_transformer"):
        return dict(heads)
    context = params.numbers("context_dim")
    return {
        **heads,
        "transformer_depth": params.integer("transformer_depth", 1),
        "context_dim": context[0] if len(context) == 1 else context,
    }
