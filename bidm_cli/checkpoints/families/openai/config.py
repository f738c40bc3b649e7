"""What an OpenAI configuration says: JSON of constructor arguments, or of the original scripts' flags.

{"unet": {"model_channels": 128, ...}, "diffusion": {"steps": 4000, ...}, "image_size": 32}
{"num_channels": 128, "attention_resolutions": "16,8", "diffusion_steps": 4000, "image_size": 32, ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bidm_cli.checkpoints.families.ldm.config import unet_from_config
from bidm_cli.checkpoints.reading.config import Config, Section
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

# Arguments of create_gaussian_diffusion, and the scripts' flags for them and for the rest.
_OF_DIFFUSION = {
    "steps", "diffusion_steps", "noise_schedule", "learn_sigma", "sigma_small", "use_kl", "predict_xstart",
    "rescale_timesteps", "rescale_learned_sigmas", "timestep_respacing",
}  # fmt: skip
_OTHER = {
    "library", "commit", "diffusion", "unet", "image_size", "large_size", "small_size", "class_cond",
    "num_classes", "use_ddim", "clip_denoised", "batch_size", "num_samples", "model_path", "lr", "ema_rate",
    "weight_decay", "lr_anneal_steps", "microbatch", "schedule_sampler", "data_dir", "log_interval",
    "save_interval", "resume_checkpoint", "fp16_scale_growth", "classifier_use_fp16", "in_channels",
    "out_channels",
}  # fmt: skip
_MULTIPLES: dict[int, list[float]] = {
    512: [0.5, 1, 1, 2, 2, 4, 4],
    256: [1, 1, 2, 2, 4, 4],
    128: [1, 1, 2, 3, 4],
    64: [1, 2, 3, 4],
    32: [1, 2, 2, 2],
}


@dataclass(frozen=True)
class OpenAISettings:
    """The settings bidm needs; None where the configuration does not say (or there is none).

    Attributes:
        unet: arguments of :class:`LDMUNet`.
        rescale: the network sees t * 1000 / T.
    """

    unet: dict[str, Any] | None = None
    image_size: int | None = None
    schedule: NoiseSchedule | None = None
    rescale: bool | None = None
    fixed_variance: Literal["small", "large"] = "large"
    prediction: Literal["epsilon", "x0"] = "epsilon"


def read_settings(config: Config) -> OpenAISettings:
    """The settings of a configuration of the layout "openai".

    Raises:
        BidmError: a setting is missing, of the wrong type, or of something bidm does not have.
    """
    root = config.root
    flags = "num_channels" in root
    diffusion = root.section("diffusion") if "diffusion" in root else root
    size = _image_size(root)
    unet = _arguments_of_flags(root, size) if flags else _arguments(root, diffusion)
    section = Section({"params": unet}, root.where)
    says = "diffusion" in root or any(name in root for name in _OF_DIFFUSION)
    return OpenAISettings(
        unet=unet_from_config(section, None)["args"],
        image_size=size,
        schedule=_schedule(diffusion) if says else None,
        rescale=diffusion.flag("rescale_timesteps", _rescaled_by_default(root, flags)) if says else None,
        fixed_variance="small" if diffusion.flag("sigma_small") else "large",
        prediction="x0" if diffusion.flag("predict_xstart") else "epsilon",
    )


def _rescaled_by_default(root: Section, flags: bool) -> bool:
    """improved-diffusion's scripts rescale unless told otherwise; its constructors and guided's do not."""
    return flags and "resblock_updown" not in root and root.get("library", "improved") == "improved"


def _image_size(root: Section) -> int | None:
    unet = root.section("unet")
    for section, name in ((root, "large_size"), (root, "image_size"), (unet, "image_size")):
        if name in section:
            size = section.integer(name)
            if not 1 <= size <= 1 << 14:
                raise section.wrong(name, "a size from 1 to 16384", size)
            return size
    return None


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
    """OpenAI's "linear" (1e-4 to 0.02, scaled by 1000 / T so that T changes little) or "cosine".

    Raises:
        BidmError: another kind.
    """
    if kind == "linear":
        scale = 1000 / timesteps
        # Fewer than 20 steps would need a beta above 1.
        return NoiseSchedule.linear(timesteps, scale * 1e-4, min(scale * 0.02, 0.999))
    if kind == "cosine":
        return NoiseSchedule.cosine(timesteps)
    raise (where or Section({}, "the configuration")).wrong("noise_schedule", "linear or cosine", kind)
