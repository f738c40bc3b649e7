"""Settings of an OpenAI configuration: JSON of constructor arguments, or of the original scripts' flags.

{"unet": {"model_channels": 128, ...}, "diffusion": {"steps": 4000, ...}, "image_size": 32}
{"num_channels": 128, "attention_resolutions": "16,8", "diffusion_steps": 4000, "image_size": 32, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bidm_cli.checkpoints.family import NetworkSettings, defaults_of, network_section, unknown_in
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

# Settings of the original constructor that change nothing in what the network computes.
_WITHOUT_EFFECT = {
    "image_size", "use_checkpoint", "use_fp16", "use_bf16", "dims", "legacy", "ckpt_path", "ignore_keys",
    "dtype", "fp16", "learn_sigma", "spatial_transformer_attn_type",
}  # fmt: skip

# Settings that tell the two codes apart, which share the network.
OPENAI_ALONE = {"learn_sigma", "rescale_timesteps", "sigma_small", "predict_xstart", "noise_schedule"}
LDM_ALONE = {
    "linear_start", "linear_end", "parameterization", "conditioning_key", "scale_factor", "scale_by_std",
    "first_stage", "first_stage_config", "cond_stage_config", "beta_schedule",
}  # fmt: skip

# Arguments of create_gaussian_diffusion, and the scripts' flags for them and for the rest.
_OF_DIFFUSION = {
    "steps", "diffusion_steps", "noise_schedule", "learn_sigma", "sigma_small", "use_kl", "predict_xstart",
    "rescale_timesteps", "rescale_learned_sigmas", "timestep_respacing",
}  # fmt: skip
_SCHEDULE_NAMES = ("steps|diffusion_steps", "noise_schedule")
_OTHER = {
    "library", "commit", "diffusion", "unet", "image_size", "large_size", "small_size", "class_cond",
    "num_classes", "use_ddim", "clip_denoised", "batch_size", "num_samples", "model_path", "lr", "ema_rate",
    "weight_decay", "lr_anneal_steps", "microbatch", "schedule_sampler", "data_dir", "log_interval",
    "save_interval", "resume_checkpoint", "fp16_scale_growth", "classifier_use_fp16", "in_channels",
    "out_channels",
}  # fmt: skip
_MULTIPLES: dict[int, list[float]] = {
    512: [0.5, 1, 1, 2, 2, 4, 4], 256: [1, 1, 2, 2, 4, 4], 128: [1, 1, 2, 3, 4], 64: [1, 2, 3, 4],
    32: [1, 2, 2, 2],
}  # fmt: skip
_FLAGS = {
    "conv_resample": True, "use_scale_shift_norm": False, "resblock_updown": False,
    "use_new_attention_order": False, "use_spatial_transformer": False, "use_linear_in_transformer": False,
    "disable_middle_self_attn": False,
}  # fmt: skip
"""Flags of the U-Net's constructor and their defaults."""


@dataclass(frozen=True)
class OpenAISettings(NetworkSettings):
    """Settings of a configuration; None where it does not say. ``rescale``: the network sees t * 1000 / T."""

    image_size: int | None = None
    schedule: NoiseSchedule | None = None
    rescale: bool | None = None
    fixed_variance: Literal["small", "large"] = "large"
    prediction: Literal["epsilon", "x0"] | None = None
    clips: bool = True


def is_network_alone(config: Config) -> bool:
    """True if JSON says nothing but the arguments of the U-Net that LDM's and OpenAI's codes share."""
    values = config.root.values
    return config.layout == "ldm" and config.kind == "arguments" and not _names(values) & LDM_ALONE


def is_openai(values: Mapping[str, Any]) -> bool:
    """True if JSON is OpenAI's: LDM has the same network and none of these settings."""
    if "num_channels" in values or values.get("library") in ("guided", "improved", "openai"):
        return True
    names = _names(values)
    same_network = "model_channels" in network_section(values)
    return same_network and bool(names & OPENAI_ALONE) and not names & LDM_ALONE


def _names(values: Mapping[str, Any]) -> set[str]:
    """Names at the top and of the diffusion settings."""
    diffusion = values.get("diffusion")
    return set(values) | (set(diffusion) if isinstance(diffusion, dict) else set())


def read_settings(config: Config) -> OpenAISettings:
    """The settings of a configuration of the layout "openai"."""
    root = config.root
    flags = "num_channels" in root
    diffusion = root.inside("diffusion")
    places = ((root, "large_size"), (root, "image_size"), (root.section("unet"), "image_size"))
    size = first(Section.side, *places)
    unet = _arguments_of_flags(root, size) if flags else _arguments(root, diffusion)
    says = "diffusion" in root or any(name in root for name in _OF_DIFFUSION)
    # improved-diffusion's scripts rescale unless a flag says otherwise; its constructors and guided's do not.
    rescales = flags and "resblock_updown" not in root and root.get("library", "improved") == "improved"
    return OpenAISettings(
        unet=unet_arguments(Section(unet, f"{root.where}: params")),
        image_size=size,
        schedule=_schedule(diffusion) if says else None,
        rescale=diffusion.flag("rescale_timesteps", rescales) if says else None,
        fixed_variance="small" if diffusion.flag("sigma_small") else "large",
        prediction=("x0" if diffusion.flag("predict_xstart") else "epsilon") if says else None,
        clips=diffusion.flag("clip_denoised", root.flag("clip_denoised", True)),
        notes=(
            *(defaults_of(diffusion, _SCHEDULE_NAMES, "override with `settings`") if says else ()),
            *(unknown_in(diffusion, _OF_DIFFUSION | {"clip_denoised"}) if "diffusion" in root else ()),
        ),
    )


def _arguments(root: Section, diffusion: Section) -> dict[str, Any]:
    """Constructor arguments as they stand, with the number of channels that the original scripts give."""
    if "unet" in root:
        unet = dict(root.section("unet").values)
    else:
        left_out = _OF_DIFFUSION | (_OTHER - {"num_classes", "in_channels", "out_channels"})
        unet = {name: value for name, value in root.values.items() if name not in left_out}
    found = Section(unet, root.where)
    channels = found.integer("in_channels", 3)
    sigma = found.flag("learn_sigma", diffusion.flag("learn_sigma"))
    unet["in_channels"] = channels
    unet["out_channels"] = found.integer("out_channels", 2 * channels if sigma else channels)
    if "num_heads" not in found and "num_head_channels" not in found:
        unet["num_heads"] = 1
    return unet


def _arguments_of_flags(root: Section, size: int | None) -> dict[str, Any]:
    """Constructor arguments from the scripts' flags, which give attention as sizes in pixels.

    What is not set is the scripts' default, which for FiLM is not the constructor's.
    """
    if size is None:
        raise BidmError(f"{root.where}: no image_size")
    attention = _numbers_in(root, "attention_resolutions", "16,8")
    upsampler = "large_size" in root
    # The upsampler to 512 is as wide as the one to 256.
    multiples = _numbers_in(root, "channel_mult", "") or _MULTIPLES.get(min(size, 256) if upsampler else size)
    if multiples is None or any(not 1 <= pixels <= size for pixels in attention):
        raise BidmError(f"{root.where}: channel_mult or attention_resolutions do not fit an image of {size}")
    unet: dict[str, Any] = {
        "in_channels": root.integer("in_channels", 6 if upsampler else 3),
        "out_channels": root.integer("out_channels", 6 if root.flag("learn_sigma") else 3),
        "model_channels": root.integer("num_channels"),
        "channel_mult": multiples,
        "attention_resolutions": [int(size // pixels) for pixels in attention],
        "num_res_blocks": root.integer("num_res_blocks", 2),
        "num_heads": root.integer("num_heads", 4),
        "use_scale_shift_norm": root.flag("use_scale_shift_norm", True),
    }
    if root.flag("class_cond"):
        unet["num_classes"] = root.integer("num_classes", 1000)
    unknown = set(root.values) - _OF_DIFFUSION - _OTHER - {"num_channels", "attention_resolutions"}
    return unet | {name: root.values[name] for name in unknown if name not in unet}


def _numbers_in(root: Section, name: str, default: str) -> list[float]:
    """A list of numbers, or the scripts' "16,8" or 16."""
    value = root.get(name, default)
    items = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    return root.numbers(name, None) if items is None else Section({name: items}, root.where).numbers(name)


def _schedule(diffusion: Section) -> NoiseSchedule:
    name = "steps" if "steps" in diffusion else "diffusion_steps"
    timesteps = diffusion.integer(name, 1000)
    if not 2 <= timesteps <= 100_000:
        raise diffusion.wrong(name, "a number of steps from 2 to 100000", timesteps)
    return schedule_of(diffusion.text("noise_schedule", "linear"), timesteps, diffusion)


def schedule_of(kind: str, timesteps: int, where: Section | None = None) -> NoiseSchedule:
    """OpenAI's "linear" (1e-4 to 0.02, scaled by 1000 / T so that T changes little) or "cosine"."""
    if kind == "linear":
        scale = 1000 / timesteps
        # Fewer than 20 steps would need a beta above 1.
        return NoiseSchedule.linear(timesteps, scale * 1e-4, min(scale * 0.02, 0.999))
    if kind == "cosine":
        return NoiseSchedule.cosine(timesteps)
    raise (where or Section({}, "the configuration")).wrong("noise_schedule", "linear or cosine", kind)


def unet_arguments(params: Section) -> dict[str, Any]:
    """Arguments of :class:`LDMUNet` from those of OpenAI's, CompVis' or Stability's ``UNetModel``."""
    blocks = params.numbers("num_res_blocks")
    arguments: dict[str, Any] = {
        "in_channels": params.integer("in_channels"),
        "out_channels": params.integer("out_channels"),
        "model_channels": params.integer("model_channels"),
        "num_res_blocks": blocks[0] if len(blocks) == 1 else blocks,
        "channel_mult": params.numbers("channel_mult", [1, 2, 4, 8]),
        "attention_resolutions": params.numbers("attention_resolutions"),
        "dropout": params.number("dropout", 0.0),
        **{name: params.flag(name, default) for name, default in _FLAGS.items()},
        **_attention_arguments(params),
        **_attention_by_level(params),
        **_label_embedding(params),
    }
    known = {*arguments, *_WITHOUT_EFFECT, "context_dim"}
    unknown = [name for name, value in params.values.items() if not (name in known or value in (None, False))]
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


def _attention_arguments(params: Section) -> dict[str, Any]:
    names = ("num_heads", "num_head_channels", "num_heads_upsample")
    heads = {name: params.integer(name, -1) for name in names}
    if not params.flag("legacy", True):
        # The original then derives the heads of every layer from num_heads, the decoder's, too.
        heads["num_heads_upsample"] = -1
    if heads["num_heads"] == -1 and heads["num_head_channels"] == -1:
        raise BidmError(f"{params.where}: either num_heads or num_head_channels has to be set")
    if not params.flag("use_spatial_transformer"):
        return heads
    depth, context = params.integer("transformer_depth", 1), params.numbers("context_dim")
    return {**heads, "transformer_depth": depth, "context_dim": context[0] if len(context) == 1 else context}
