"""Settings of an LDM configuration: CompVis' config.yaml, or JSON of constructor arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bidm_cli.checkpoints.evidence import left_out
from bidm_cli.checkpoints.families.ddpm import ddpm_unet_arguments
from bidm_cli.checkpoints.families.ldm.conditions import (
    Conditioner,
    LowScale,
    read_conditioner,
    read_low_scale,
)
from bidm_cli.checkpoints.families.openai.config import unet_arguments
from bidm_cli.checkpoints.family import SET_SCHEDULE, defaults_of, unknown_in
from bidm_cli.checkpoints.first_stages.compvis import Architecture, first_stage_from_config
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.schedules import check_schedule, explicit_betas, zero_terminal_snr
from bidm_cli.diffusion.schedule import NoiseSchedule

Prediction = Literal["epsilon", "x0", "v"]
_PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "epsilon": "epsilon", "x0": "x0", "v": "v"}
_PREDICTIONS["velocity"] = "v"
_SCRIPTS = {
    "timesteps": "steps", "beta_schedule": "noise_schedule", "linear_start": "beta_start",
    "linear_end": "beta_end",
}  # fmt: skip
"""Names that other codes have for LDM's settings."""

_ZERO_SNR = ("rescale_betas_zero_snr", "zero_snr", "zero_terminal_snr", "enforce_zero_terminal_snr")
_CONDITIONING = (
    None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm", "hybrid-sequential",
    "sequential",
)  # fmt: skip
_PARAMS = {
    *_ZERO_SNR, "unet_config", "timesteps", "beta_schedule", "loss_type", "ckpt_path", "ignore_keys",
    "load_only_unet", "monitor", "use_ema", "first_stage_key", "image_size", "channels", "log_every_t",
    "clip_denoised", "linear_start", "linear_end", "cosine_s", "given_betas", "original_elbo_weight",
    "v_posterior", "l_simple_weight", "conditioning_key", "parameterization", "scheduler_config",
    "use_positional_encodings", "learn_logvar", "logvar_init", "first_stage_config", "cond_stage_config",
    "num_timesteps_cond", "cond_stage_key", "cond_stage_trainable", "concat_mode", "cond_stage_forward",
    "scale_factor", "scale_by_std", "make_it_fit", "ucg_training", "reset_ema", "reset_num_ema_updates",
    "low_scale_config", "low_scale_key", "concat_keys", "masked_image_key", "finetune_keys", "unet_trainable",
    "noise_aug_config", "noise_aug_key", "depth_stage_config", "base_learning_rate", "weight_decay",
    "embedder_config", "embedding_key", "embedding_dropout", "force_null_conditioning", "text_embedding_key",
}  # fmt: skip
"""Arguments of LDM's models; those that bidm does not read are for training, or change no number."""

# What flat JSON may hold besides the network's arguments.
_OF_DIFFUSION = {
    "timesteps", "steps", "beta_schedule", "noise_schedule", "linear_start", "linear_end", "beta_start",
    "beta_end", "cosine_s", "parameterization", "scale_factor", "scale_by_std", "channels", "first_stage",
    "first_stage_config", "cond_stage_config", "conditioning_key", "diffusion", "library", "commit",
}  # fmt: skip


@dataclass(frozen=True)
class LDMSettings:
    """Settings of a configuration; None where it does not say.

    Attributes:
        first_stage: architecture, or None for an identity or none.
        scale_by_std: the file has to hold the scale factor.
        latent: False for LDM's pixel models.
        names_first_stage: there is one, whether its architecture is said or not.
        low_scale: the noise on the small image of an upscaler.
        v_posterior, clips: of ancestral sampling; ``clips`` is for pixel models. where: for messages.
        notes: on settings that are passed over. defaults: on those of the schedule that are assumed.
    """

    unet: Architecture | None = None
    first_stage: Architecture | None = None
    conditioner: Conditioner = field(default_factory=Conditioner)
    schedule: NoiseSchedule | None = None
    prediction: Prediction | None = None
    scale_factor: float | None = None
    scale_by_std: bool = False
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    latent: bool = True
    names_first_stage: bool = False
    low_scale: LowScale | None = None
    v_posterior: float = 0.0
    clips: bool = True
    where: str = "the configuration"
    notes: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()


def read_settings(config: Config) -> LDMSettings:
    """The settings of a configuration of the layout "ldm"."""
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
    for ours, theirs in _SCRIPTS.items():
        if theirs in params and ours not in params:
            params[ours] = params.pop(theirs)
    params["unet_config"] = {"params": unet}
    if isinstance(params.get("first_stage"), dict):
        first_stage = params.pop("first_stage")
        params["first_stage_config"] = first_stage if "params" in first_stage else {"params": first_stage}
    return Section(params, root.where)


def _settings(params: Section, target: str, complete: bool) -> LDMSettings:
    """``complete``: absent settings have the original constructor's defaults (not so in partial JSON)."""
    unet = params.section("unet_config").section("params")
    image_size = first(Section.sides, (params, "image_size"), (unet, "image_size"))
    prediction = params.choice("parameterization", _PREDICTIONS, "eps", "eps, x0 or v")
    first_stage, names_first_stage = None, False
    if "first_stage_config" in params and not isinstance(params.get("first_stage_config"), str):
        section = params.section("first_stage_config")
        names_first_stage = not section.text("target", "").endswith("IdentityFirstStage")
        first_stage = first_stage_from_config(section) if "params" in section else None
    says_schedule = complete or bool({"timesteps", "beta_schedule", "linear_start"} & params.values.keys())
    names = () if "given_betas" in params else ("timesteps", "linear_start", "linear_end")
    return LDMSettings(
        unet=unet_from_config(params.section("unet_config"), image_size),
        first_stage=first_stage,
        conditioner=read_conditioner(params),
        schedule=_schedule(params) if says_schedule else None,
        prediction=prediction if complete or "parameterization" in params else None,
        scale_factor=params.number("scale_factor", 1.0) if complete or "scale_factor" in params else None,
        scale_by_std=params.flag("scale_by_std", False),
        image_size=image_size,
        channels=first(Section.integer, (params, "channels")),
        latent=not target.endswith(".DDPM"),
        names_first_stage=names_first_stage,
        low_scale=read_low_scale(params),
        v_posterior=params.number("v_posterior", 0.0),
        clips=params.flag("clip_denoised", True),
        where=params.where,
        notes=tuple(_notes(params)) if complete else (),
        defaults=tuple(defaults_of(params, names, SET_SCHEDULE)) if says_schedule else (),
    )


def _notes(params: Section) -> list[str]:
    """Notes on a config.yaml: odd variances and conditions, settings that bidm does not know."""
    notes = []
    if params.number("v_posterior", 0.0) not in (0.0, 1.0):
        notes.append(
            left_out(
                f"v_posterior {params.number('v_posterior'):g} is passed over: ancestral sampling has the "
                f"posterior's variance or beta, which are 0 and 1 ({params.where})"
            )
        )
    key = params.get("conditioning_key", None)
    if key not in _CONDITIONING:
        notes.append(left_out(f"conditioning_key {str(key)[:40]!r} is passed over ({params.where})"))
    return notes + unknown_in(params, _PARAMS)


def _schedule(params: Section) -> NoiseSchedule:
    schedule = _betas(params)
    if any(params.flag(name) for name in _ZERO_SNR):
        return NoiseSchedule.explicit(zero_terminal_snr(schedule.alphas_cumprod))
    return schedule


def _betas(params: Section) -> NoiseSchedule:
    if "given_betas" in params:
        return NoiseSchedule.explicit((1 - explicit_betas(params, "given_betas")).cumprod(0))
    timesteps = params.integer("timesteps", 1000)
    kind = params.text("beta_schedule", "linear")
    ends = (params.number("linear_start", 1e-4), params.number("linear_end", 2e-2))
    check_schedule(params.where, *ends, timesteps)
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


def unet_from_config(section: Section, image_size: tuple[int, int] | None) -> Architecture:
    """Architecture from ``unet_config``: CompVis' UNetModel, or its ``Model`` (the DDPM U-Net)."""
    params = section.section("params")
    if "ch_mult" in params and "model_channels" not in params:
        size = params.integer("resolution", image_size[0] if image_size else None)
        return {"kind": "ddpm_unet", "args": ddpm_unet_arguments(params, size)}
    return {"kind": "ldm_unet", "args": unet_arguments(params)}
