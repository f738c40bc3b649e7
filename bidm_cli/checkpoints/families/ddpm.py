"""The DDPM family: list checkpoints of ermongroup/ddim, bare state dicts of pesser/pytorch_diffusion, dicts
that wrap either, and ddim's .yml or JSON of constructor arguments alone.

Sampling conventions follow the code a file comes with. Both take DDIM steps at range(0, T, T//S) down to
alpha-bar 1 without clipping, and both clip x0 in ancestral sampling; they differ in its variance:
ermongroup's ``ddpm_noisy`` has its own formula whatever the configuration's ``var_type`` says, pesser's
follows ``var_type``. A list checkpoint or a ddim configuration means ermongroup, anything else pesser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import Detected
from bidm_cli.checkpoints.families.ddpm_unet import ddpm_unet_arguments, infer_ddpm_unet
from bidm_cli.checkpoints.reading.config import Config, Section
from bidm_cli.checkpoints.reading.schedules import one_line
from bidm_cli.checkpoints.reading.state import Weights, load_strictly, on_meta, shapes_of
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_EMA = re.compile(r"(?<![a-z])ema(?![a-z])")
Variance = Literal["small", "large", "ddim_noisy"]
_VARIANCES: dict[str, Variance] = {"fixedlarge": "large", "fixedsmall": "small"}


@dataclass(frozen=True)
class DDPMSettings:
    """What a configuration says; None where it does not."""

    unet: dict[str, Any] | None = None
    image_size: int | None = None
    channels: int | None = None
    schedule: NoiseSchedule | None = None
    variance: Variance | None = None
    is_ddim: bool = False


def load(detected: Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
    """A :class:`Checkpoint` from a file found to be of this family.

    Raises:
        BidmError: weights and architecture do not fit, or settings make no sense.
    """
    notes = list(detected.evidence)
    settings = DDPMSettings() if config is None else read_settings(config)
    origin = "inferred from names and shapes" if config is None else f"from {config.path}"
    notes.append(f"architecture {origin}")
    chosen, averaged = _choose(detected.weights, ema, source, notes)
    arguments = settings.unet or infer_ddpm_unet(shapes_of(chosen.tensors))
    architecture = {"kind": "ddpm_unet", "args": arguments}
    unet = load_strictly(
        architecture, chosen.tensors, "U-Net", origin=origin, ignored=lambda name: name == "logvar"
    )
    is_list = any(weights.where.startswith("[") for weights in detected.weights)
    return _assemble(settings, arguments, unet, is_list, notes, source=source, ema=averaged)


def from_config(config: Config) -> Checkpoint:
    """The network of a bare configuration, on the meta device.

    Raises:
        BidmError: settings are missing or make no sense.
    """
    settings = read_settings(config)
    notes = [f"family ddpm: configuration {config.path}; no weights"]
    assert settings.unet is not None
    unet = on_meta({"kind": "ddpm_unet", "args": settings.unet})
    return _assemble(settings, settings.unet, unet, False, notes, source=config.path, has_weights=False)


def _assemble(
    settings: DDPMSettings,
    arguments: dict[str, Any],
    unet: torch.nn.Module,
    is_list: bool,
    notes: list[str],
    **about: Any,
) -> Checkpoint:
    size = settings.image_size or _assume_size(arguments, notes)
    schedule = settings.schedule
    if schedule is None:
        schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
        notes.append(
            "schedule: linear, T=1000, 0.0001 to 0.02 (assumed, as the whole family; "
            "override with --set beta_schedule=..., beta_start, beta_end, timesteps)"
        )
    else:
        notes.append(f"schedule: {one_line(schedule)} (from the configuration)")
    return Checkpoint(
        family="ddpm",
        unet=unet,
        architecture={
            "unet": {"kind": "ddpm_unet", "args": arguments},
            "first_stage": None,
            "conditioner": None,
        },
        sample_shape=(settings.channels or arguments["out_channels"], size, size),
        schedule=schedule,
        convention=SamplingConvention(
            spacing="ddim",
            final_alpha="one",
            clip="none",
            clip_ancestral=True,
            variance=_variance(settings, is_list, size, notes),
        ),
        evidence=notes,
        **about,
    )


def _choose(found: list[Weights], ema: bool, source: Path, notes: list[str]) -> tuple[Weights, bool]:
    """(the state dict to load, whether it is the averaged one).

    In a list the first is as trained and the last of five the average; in a dict the name says it.
    """
    averaged = [weights for weights in found if weights.where == "[4]" or weights.is_average]
    trained = [weights for weights in found if weights not in averaged]
    if not trained and not ema:
        raise BidmError("the file holds averaged (EMA) weights alone; load it with them")
    if averaged and (ema or not trained):
        notes.append(f"weights: EMA ({averaged[-1].where})")
        return averaged[-1], True
    if averaged:
        notes.append(f"weights: as trained ({trained[0].where}); the averaged (EMA) ones were not asked for")
    elif _EMA.search(f"{source.parent.name}/{source.name}".lower()):
        notes.append(f"weights: EMA (by the file's name, {source.parent.name}/{source.name})")
        return trained[0], True
    else:
        notes.append("weights: the only ones in the file, averaged or not it does not say")
    return trained[0], False


def read_settings(config: Config) -> DDPMSettings:
    """The settings of a configuration of the layout "ddpm".

    Raises:
        BidmError: a setting is missing, of the wrong type, or of something bidm does not have.
    """
    root = config.root
    is_ddim = config.kind == "yaml"
    flat = "ch_mult" in root
    model = root.section("model") if is_ddim else root if flat else root.section("unet")
    diffusion = root if flat else root.section("diffusion")
    data = root.section("data")
    size = _first(Section.integer, (data, "image_size"), (model, "resolution"), (model, "image_size"))
    size = size or _first(Section.integer, (root, "image_size"), (diffusion, "image_size"))
    if size is None or not 1 <= size <= 1 << 14:
        raise BidmError(
            f"{root.where}: no usable image size (data.image_size, or resolution); it says {size}"
        )
    var_type = model.get("var_type", None) or diffusion.get("var_type", diffusion.get("model_var_type", None))
    return DDPMSettings(
        unet=ddpm_unet_arguments(model, size),
        image_size=size,
        channels=_first(Section.integer, (data, "channels"), (model, "in_channels")),
        schedule=_schedule(diffusion),
        variance=_VARIANCES.get(str(var_type)),
        is_ddim=is_ddim,
    )


def _first(read: Any, *places: tuple[Section, str]) -> Any:
    """The first of these settings that is there."""
    return next((read(section, name) for section, name in places if name in section), None)


def _schedule(diffusion: Section) -> NoiseSchedule:
    """ddim's schedules; pesser's names for the same numbers count too."""
    kind = diffusion.text("beta_schedule", "linear")
    start = _first(Section.number, (diffusion, "beta_start"), (diffusion, "beta_0")) or 1e-4
    end = _first(Section.number, (diffusion, "beta_end"), (diffusion, "beta_T")) or 0.02
    timesteps = _first(
        Section.integer,
        *((diffusion, name) for name in ("num_diffusion_timesteps", "timesteps", "T", "steps")),
    )
    timesteps = timesteps or 1000
    if not 2 <= timesteps <= 100_000 or not 0 < start <= end < 1:
        raise BidmError(
            f"{diffusion.where}: no noise schedule runs from {start} to {end} in {timesteps} steps"
        )
    if kind == "linear":
        return NoiseSchedule.linear(timesteps, start, end)
    if kind == "quad":
        return NoiseSchedule.scaled_linear(timesteps, start, end)
    return NoiseSchedule.explicit((1 - _betas(diffusion, kind, start, end, timesteps)).cumprod(0))


def _betas(diffusion: Section, kind: str, start: float, end: float, timesteps: int) -> Tensor:
    """The schedules that have no closed form of their own here, as betas [T]."""
    if kind == "const":
        return torch.full((timesteps,), end, dtype=torch.float64)
    if kind == "jsd":
        return 1.0 / torch.linspace(timesteps, 1, timesteps, dtype=torch.float64)
    if kind == "sigmoid":
        return torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid() * (end - start) + start
    raise diffusion.wrong("beta_schedule", "linear, quad, const, jsd or sigmoid", kind)


def _assume_size(arguments: dict[str, Any], notes: list[str]) -> int:
    """Image size from where the attention is: at 16x16 in every published network."""
    levels = arguments["attention_levels"]
    size = 16 * 2 ** levels[0] if levels else 32
    reason = "attention at 16x16 as in the published networks" if levels else "no attention to tell by"
    notes.append(f"size {size}x{size} (assumed: {reason}; override with --set image_size=N)")
    return size


def _variance(settings: DDPMSettings, is_list: bool, size: int, notes: list[str]) -> Variance:
    if is_list or settings.is_ddim:
        notes.append("ancestral sampling: ermongroup's ddpm_noisy (a list checkpoint or ddim configuration)")
        return "ddim_noisy"
    if settings.variance is not None:
        return settings.variance
    variance: Variance = "small" if size >= 256 else "large"
    notes.append(
        f"ancestral sampling: fixed{variance} variance (assumed, as the published {size}x{size} networks; "
        "override with --set variance=small or large)"
    )
    return variance
