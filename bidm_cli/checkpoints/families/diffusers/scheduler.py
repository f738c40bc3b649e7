"""A diffusers ``scheduler_config.json`` as noise schedule, sampling convention and prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints.evidence import assumed
from bidm_cli.checkpoints.family import SET_SCHEDULE
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.schedules import check_schedule, explicit_betas, zero_terminal_snr
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

Prediction = Literal["epsilon", "x0", "v"]
_VARIANCES: dict[str, Literal["small", "large", "learned_range", "learned"]] = {
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "fixed_large_log": "large",
    "learned_range": "learned_range", "learned": "learned",
}  # fmt: skip
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_SPACINGS: dict[str, Literal["leading", "linspace", "trailing"]] = {
    "leading": "leading", "linspace": "linspace", "trailing": "trailing",
}  # fmt: skip
# Their models see a noise level, a flow's time or tokens, not a step of a schedule of betas.
_OTHERS = (
    "FlowMatch", "FlowMap", "ScoreSde", "EDM", "KarrasVe", "CMStochastic", "VQDiffusion", "Amused", "IPNDM",
    "CosineDPM", "DDPMWuerstchen", "CogVideoX", "Helios", "LTX", "SCM", "Piflow", "DiscreteDDIM",
    "BlockRefinement", "EntropyBound",
)  # fmt: skip
_CLIPPING = (
    "", "DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler",
    "DDPMParallelScheduler", "RePaintScheduler", "UnCLIPScheduler",
)  # fmt: skip
_OWN_BETAS: dict[str, tuple[str, float, float]] = {
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), ("scaled_linear", 0.00085, 0.012)),
    **dict.fromkeys(
        (
            "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
            "DPMSolverSDEScheduler",
        ),
        ("linear", 0.00085, 0.012),
    ),
    "UnCLIPScheduler": ("squaredcos_cap_v2", 1e-4, 0.02),
}  # fmt: skip
"""Schedulers whose betas, where the file does not say, are not DDPM's linear 1e-4 to 0.02."""


@dataclass(frozen=True)
class SchedulerSettings:
    """Settings of a scheduler's configuration; ``notes`` are for the evidence."""

    schedule: NoiseSchedule
    convention: SamplingConvention
    prediction: Prediction
    notes: list[str]


def read_scheduler(section: Section) -> SchedulerSettings:
    """Settings of a scheduler; absent ones have diffusers' defaults.

    Sampling is DDIM's or DDPM's whichever scheduler class the folder names: that is the class's own
    ``from_config``. Only schedulers that clip by default are taken to clip when they do not say.
    """
    name = section.text("_class_name", "")
    if name.startswith(_OTHERS):
        raise BidmError(
            f"{section.where}: models for {name} are not trained on the steps of a noise schedule; bidm has "
            "discrete-time diffusion alone; if this one is, put its own scheduler_config.json there"
        )
    clips = section.flag("clip_sample", name in _CLIPPING)
    notes = []
    if name and name not in _CLIPPING:
        notes.append(f"scheduler {name}: sampled by DDIM or DDPM on its schedule")
    offset = section.integer("steps_offset", 0)
    if not 0 <= offset < 1000:
        raise section.wrong("steps_offset", "a number from 0 to 999", offset)
    convention = SamplingConvention(
        spacing=section.choice("timestep_spacing", _SPACINGS, "leading"),
        final_alpha="one" if section.flag("set_alpha_to_one", name != "PNDMScheduler") else "first",
        **_clipping(section, clips, notes),
        variance=section.choice("variance_type", _VARIANCES, "fixed_small"),
        steps_offset=offset,
    )
    schedule = _schedule(section)
    return SchedulerSettings(schedule, convention, _prediction(section, notes), [*_defaults(section), *notes])


def _prediction(section: Section, notes: list[str]) -> Prediction:
    """Prediction of the network; before 0.10 the setting was ``predict_epsilon``, false for x0."""
    if "prediction_type" in section:
        return section.choice("prediction_type", _PREDICTIONS)
    if "predict_epsilon" in section:
        return "epsilon" if section.flag("predict_epsilon") else "x0"
    notes.append(
        assumed(
            f"the network predicts the noise (assumed, diffusers' default: no prediction_type in "
            f"{section.where}; override with `settings` prediction=v or x0)"
        )
    )
    return "epsilon"


def _defaults(section: Section) -> list[str]:
    """Note on the schedule's settings that a scheduler's configuration leaves to diffusers' defaults."""
    names = ["num_train_timesteps", "beta_schedule"]
    if section.get("beta_schedule", "linear") not in ("squaredcos_cap_v2", "laplace"):
        names += ["beta_start", "beta_end"]
    missing = [name for name in names if name not in section]
    if not missing or not section.values or "trained_betas" in section:
        return []
    reason = f"assumed, diffusers' defaults: {section.where} does not say; {SET_SCHEDULE}"
    return [assumed(f"{', '.join(missing)} ({reason})")]


def _clipping(section: Section, clips: bool, notes: list[str]) -> dict[str, Any]:
    """Treatment of x0: dynamic thresholding, else clipping, else nothing."""
    if section.flag("thresholding"):
        quantile = section.number("dynamic_thresholding_ratio", 0.995)
        largest = section.number("sample_max_value", 1.0)
        if not 0 < quantile <= 1 or not largest > 0:
            wrong = "dynamic_thresholding_ratio" if not 0 < quantile <= 1 else "sample_max_value"
            raise section.wrong(wrong, "a number above 0 (a ratio at most 1)", section.get(wrong))
        notes.append(f"x0 is thresholded at the quantile {quantile:g}, up to {largest:g}")
        clipping = {"threshold_quantile": quantile, "threshold_max": largest}
        return {"clip": "keep_eps", "clip_ancestral": True, **clipping}
    if not clips:
        return {}
    limit = section.number("clip_sample_range", 1.0)
    if not limit > 0:
        raise section.wrong("clip_sample_range", "a number above 0", limit)
    if limit != 1.0:
        notes.append(f"x0 is clipped to [-{limit:g}, {limit:g}]")
    return {"clip": "keep_eps", "clip_ancestral": True, "clip_range": limit}


def _schedule(section: Section) -> NoiseSchedule:
    if "trained_betas" in section:
        return _explicit(section, explicit_betas(section, "trained_betas"))
    timesteps = section.integer("num_train_timesteps", 1000)
    own = _OWN_BETAS.get(section.text("_class_name", ""), ("linear", 1e-4, 0.02))
    kind = section.text("beta_schedule", own[0])
    start, end = section.number("beta_start", own[1]), section.number("beta_end", own[2])
    check_schedule(section.where, start, end, timesteps)
    if kind == "sigmoid":
        grid = torch.linspace(-6, 6, timesteps, dtype=torch.float32)
        return _explicit(section, grid.sigmoid() * (end - start) + start)
    if kind == "laplace":
        return _explicit(section, _laplace(timesteps))
    if kind == "linear":
        schedule = NoiseSchedule.linear(timesteps, start, end)
    elif kind == "scaled_linear":
        schedule = NoiseSchedule.scaled_linear(timesteps, start, end)
    elif kind == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(timesteps)
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid or laplace"
        raise section.wrong("beta_schedule", known, kind)
    if not section.flag("rescale_betas_zero_snr"):
        return schedule
    return NoiseSchedule.explicit(zero_terminal_snr(schedule.single_precision()))


def _laplace(timesteps: int) -> Tensor:
    """Betas of alpha-bar = sqrt(s / (1 + s)), where log s falls as a Laplace distribution's quantiles."""
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    log_snr = -0.5 * (0.5 - u).sign() * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
    alpha_bar = torch.sigmoid(log_snr).sqrt()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _explicit(section: Section, betas: Tensor) -> NoiseSchedule:
    """The schedule of these betas."""
    if section.flag("rescale_betas_zero_snr"):
        return NoiseSchedule.explicit(zero_terminal_snr((1 - betas.float()).cumprod(0)))
    return NoiseSchedule.explicit((1 - betas.double()).cumprod(0))
