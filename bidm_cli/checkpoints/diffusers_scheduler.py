"""A diffusers ``scheduler_config.json`` as noise schedule, sampling convention and prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints.config import Section
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_VARIANCES: dict[str, Literal["small", "large", "learned_range"]] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned_range",
}
_PREDICTIONS: dict[str, Literal["epsilon", "x0", "v"]] = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
}
_SPACINGS: dict[str, Literal["leading", "linspace", "trailing"]] = {
    "leading": "leading",
    "linspace": "linspace",
    "trailing": "trailing",
}
# Their models see a noise level or a flow's time, not a step of a schedule.
_CONTINUOUS = ("FlowMatch", "ScoreSde", "EDM", "KarrasVe", "CMStochastic", "VQDiffusion", "Amused")
_CLIPPING = ("DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "")


@dataclass(frozen=True)
class SchedulerSettings:
    """What a scheduler's configuration says; ``notes`` are for the evidence."""

    schedule: NoiseSchedule
    convention: SamplingConvention
    prediction: Literal["epsilon", "x0", "v"]
    notes: list[str]


def read_scheduler(section: Section) -> SchedulerSettings:
    """Settings of a scheduler; absent ones have diffusers' defaults.

    Sampling is DDIM's or DDPM's whichever scheduler class the folder names: that is the class's own
    ``from_config``. Only schedulers that clip by default are taken to clip when they do not say.

    Raises:
        BidmError: a setting of the wrong type, or of something bidm does not have.
    """
    name = section.text("_class_name", "")
    if name.startswith(_CONTINUOUS):
        raise BidmError(
            f"{section.where}: models for {name} are not trained on the steps of a noise schedule; bidm has "
            "discrete-time diffusion alone"
        )
    clips = section.flag("clip_sample", name in _CLIPPING)
    notes = []
    if name and name not in _CLIPPING:
        notes.append(f"scheduler {name}: sampled by DDIM or DDPM on its schedule")
    if clips and section.number("clip_sample_range", 1.0) != 1.0:
        notes.append("clip_sample_range is not followed: x0 is clipped to [-1, 1]")
    if section.flag("thresholding"):
        notes.append("thresholding is not followed: x0 is not thresholded")
    variance = section.text("variance_type", "fixed_small")
    if variance not in _VARIANCES:
        raise section.wrong("variance_type", " or ".join(_VARIANCES), variance)
    spacing = section.text("timestep_spacing", "leading")
    if spacing not in _SPACINGS:
        raise section.wrong("timestep_spacing", " or ".join(_SPACINGS), spacing)
    prediction = section.text("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise section.wrong("prediction_type", " or ".join(_PREDICTIONS), prediction)
    offset = section.integer("steps_offset", 0)
    if not 0 <= offset < 1000:
        raise section.wrong("steps_offset", "a number from 0 to 999", offset)
    convention = SamplingConvention(
        spacing=_SPACINGS[spacing],
        final_alpha="one" if section.flag("set_alpha_to_one", name != "PNDMScheduler") else "first",
        clip="keep_eps" if clips else "none",
        clip_ancestral=clips,
        variance=_VARIANCES[variance],
        steps_offset=offset,
    )
    return SchedulerSettings(_schedule(section), convention, _PREDICTIONS[prediction], notes)


def _schedule(section: Section) -> NoiseSchedule:
    if "trained_betas" in section:
        return _explicit(section, _trained(section))
    timesteps = section.integer("num_train_timesteps", 1000)
    kind = section.text("beta_schedule", "linear")
    start, end = section.number("beta_start", 1e-4), section.number("beta_end", 0.02)
    if not 2 <= timesteps <= 100_000 or not 0 < start <= end < 1:
        raise BidmError(f"{section.where}: no noise schedule runs from {start} to {end} in {timesteps} steps")
    if kind == "linear":
        schedule = NoiseSchedule.linear(timesteps, start, end)
    elif kind == "scaled_linear":
        schedule = NoiseSchedule.scaled_linear(timesteps, start, end)
    elif kind == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(timesteps)
    elif kind == "sigmoid":
        grid = torch.linspace(-6, 6, timesteps, dtype=torch.float64)
        schedule = NoiseSchedule.explicit((1 - (grid.sigmoid() * (end - start) + start)).cumprod(0))
    else:
        raise section.wrong("beta_schedule", "linear, scaled_linear, squaredcos_cap_v2 or sigmoid", kind)
    return _explicit(section, schedule.betas) if section.flag("rescale_betas_zero_snr") else schedule


def _explicit(section: Section, betas: Tensor) -> NoiseSchedule:
    alphas = (1 - betas).cumprod(0)
    if section.flag("rescale_betas_zero_snr"):
        # arXiv 2305.08891, algorithm 1: shift sqrt(alpha-bar) so that it ends at 0, scale so that it starts
        # where it did. Not quite 0: samplers divide by it.
        roots = alphas.sqrt()
        shifted = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = shifted.square().clamp_min(1e-12)
    return NoiseSchedule.explicit(alphas)


def _trained(section: Section) -> Tensor:
    values = section.get("trained_betas")
    if not isinstance(values, list) or not 2 <= len(values) <= 100_000:
        raise section.wrong("trained_betas", "a list of 2 to 100000 numbers", values)
    try:
        betas = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise section.wrong("trained_betas", "a list of numbers", values) from None
    if betas.dim() != 1 or not bool(((betas > 0) & (betas < 1)).all()):
        raise section.wrong("trained_betas", "a list of numbers between 0 and 1", values)
    return betas
