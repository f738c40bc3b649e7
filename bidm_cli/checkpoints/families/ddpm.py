"""The DDPM family: list checkpoints of ermongroup/ddim, bare state dicts of pesser/pytorch_diffusion, dicts
that wrap either, and ddim's .yml or JSON of constructor arguments alone.

Sampling conventions follow the code a file comes with. Both take DDIM steps at range(0, T, T//S) down to
alpha-bar 1 without clipping, and both clip x0 in ancestral sampling; they differ in its variance:
ermongroup's ``ddpm_noisy`` has its own formula whatever the configuration's ``var_type`` says, pesser's
follows ``var_type``. A list checkpoint or a ddim configuration means ermongroup, anything else pesser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed, left_out
from bidm_cli.checkpoints.exporting import schedule_ends, square_side, write_checkpoint
from bidm_cli.checkpoints.first_stages.compvis import encoder_arguments
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.schedules import check_schedule, one_line
from bidm_cli.checkpoints.reading.shapes import Shapes, inferring
from bidm_cli.checkpoints.reading.state import shapes_of
from bidm_cli.checkpoints.value_range import Range, value_range
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

NAMES = ("temb.dense.0.weight", "conv_in.weight", "mid.block_1.norm1.weight", "conv_out.weight")
"""Names that all of the network's state dicts have."""

Variance = Literal["small", "large", "ddim_noisy"]
_VARIANCES: dict[str, Variance] = {"fixedlarge": "large", "fixedsmall": "small"}
_BETA_NAMES = (
    "beta_schedule", "beta_start|beta_0", "beta_end|beta_T", "num_diffusion_timesteps|timesteps|T|steps",
)  # fmt: skip
_KNOWN = {
    "dataset", "category", "image_size", "channels", "logit_transform", "uniform_dequantization",
    "gaussian_dequantization", "random_flip", "rescaled", "num_workers", "subset_1k", "out_of_dist", "path",
    "root", "type", "in_channels", "out_ch", "out_channels", "ch", "ch_mult", "num_res_blocks",
    "attn_resolutions", "dropout", "var_type", "ema_rate", "ema", "resamp_with_conv", "conv_shortcut",
    "resolution", "beta_schedule", "beta_start", "beta_end", "beta_0", "beta_T", "num_diffusion_timesteps",
    "timesteps", "T", "steps", "model_var_type", "loss_type", "device", "ckpt_dir", "num_diffusion_steps",
}  # fmt: skip
"""Settings of ddim's configurations that bidm reads, or that change nothing in what numbers mean."""
_BETAS = {"linear": "linear", "scaled_linear": "quad"}
"""The family's words for our schedules."""


@dataclass(frozen=True)
class DDPMSettings(base.NetworkSettings):
    """Settings of a configuration, ``is_ddim`` those of ermongroup/ddim; None where it does not say."""

    image_size: int | None = None
    channels: int | None = None
    schedule: NoiseSchedule | None = None
    variance: Variance | None = None
    is_ddim: bool = False
    where: str = "the configuration"


@base.register_family
class DDPM(base.OneNetworkFamily[DDPMSettings]):
    """ermongroup/ddim and pesser/pytorch_diffusion."""

    signature = base.Signature("ddpm", "DDPM (ermongroup/ddim, pesser/pytorch_diffusion)", (NAMES,))
    network_kind = "ddpm_unet"
    exports_value_range = True

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        model, unet = values.get("model"), base.network_section(values)
        if isinstance(model, dict) and {"ch", "ch_mult"} <= model.keys() and "nf" not in model:
            return "yaml"
        return "arguments" if "ch_mult" in unet and not {"model_channels", "attn"} & unet.keys() else None

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        settings = DDPMSettings() if config is None else self.read_settings(config)
        origin = base.INFERRED if config is None else f"from {config.path}"
        notes.append(f"architecture {origin}")
        notes.extend(settings.notes)
        choice = base.choose_weights(detected.weights, ema, notes, source=source)
        tensors = choice.weights.tensors
        if "logvar" in tensors:
            notes.append(left_out("logvar: the log variance per timestep that a bayesian model learned"))
        arguments = settings.unet or infer_ddpm_unet(shapes_of(tensors))
        if any(weights.where.startswith("[") for weights in detected.weights):
            settings = replace(settings, is_ddim=True)
        about = {"source": source, "ema": choice.averaged}
        ignored = {"logvar", *choice.spare}
        return self.assemble(settings, self.built(arguments, tensors, notes, origin, ignored, **about))

    def assemble(self, settings: DDPMSettings, found: base.Found) -> Checkpoint:
        arguments, notes = found.arguments, found.notes
        size = settings.image_size or assumed_size(arguments, notes)
        schedule = settings.schedule
        if schedule is None:
            schedule = base.assumed_linear("as the whole family", notes)
        else:
            notes.append(f"schedule: {one_line(schedule)} (from the configuration)")
        learned = base.has_learned_variance(arguments, notes)
        network = arguments["in_channels" if learned else "out_channels"]
        channels = base.channels_of(network, settings.channels, settings.where, notes)
        variance = "learned_range" if learned else _variance(settings, size, notes)
        return self.pixel_checkpoint(
            settings,
            found,
            sample_shape=(channels, size, size),
            schedule=schedule,
            convention=SamplingConvention(spacing="ddim", clip_ancestral=True, variance=variance),
        )

    def read_settings(self, config: Config) -> DDPMSettings:
        root = config.root
        is_ddim = config.kind == "yaml"
        flat = "ch_mult" in root
        model = root.section("model") if is_ddim else root if flat else root.section("unet")
        diffusion = root if flat else root.section("diffusion")
        data = root.section("data")
        places = [(section, "image_size") for section in (model, root, diffusion)]
        size = first(Section.side, (data, "image_size"), (model, "resolution"), *places)
        if size is None:
            raise BidmError(f"{root.where}: no image size (data.image_size, or resolution)")
        var_type = first(
            Section.get, *((s, "var_type") for s in (model, diffusion)), (diffusion, "model_var_type")
        )
        return DDPMSettings(
            unet=ddpm_unet_arguments(model, size),
            image_size=size,
            channels=first(Section.integer, (data, "channels"), (model, "in_channels")),
            schedule=_schedule(diffusion),
            variance=_VARIANCES.get(str(var_type)),
            is_ddim=is_ddim,
            where=root.where,
            value_range=_value_range(data),
            notes=(
                *base.defaults_of(diffusion, _BETA_NAMES, base.SET_SCHEDULE),
                *_passed_over(data),
                *(
                    note
                    for name in (("data", "model", "diffusion") if is_ddim else ())
                    for note in base.unknown_in(root.section(name), _KNOWN)
                ),
            ),
        )

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write ermongroup's list with EMA, or pesser's bare state dict, by how the model samples."""
        is_ddim = model.convention.variance == "ddim_noisy"
        config = _config(model, is_ddim)
        if not is_ddim:
            return write_checkpoint(path, dict(weights), config)
        raw = {f"module.{key}": tensor for key, tensor in weights.items()}
        return write_checkpoint(path, [raw, {}, 0, 0, dict(weights)], config, ".yml")


def _value_range(data: Section) -> tuple[Range, str] | None:
    """ddim's ``data_transform`` (datasets/__init__.py): [-1, 1] if rescaled, else logits, else [0, 1]."""
    if data.flag("rescaled", True):
        return None
    if data.flag("logit_transform"):
        return "logit", f"logit_transform true and rescaled false in {data.where}"
    return "unit", f"rescaled false in {data.where}"


def _passed_over(data: Section) -> list[str]:
    """Notes on settings of the training images that bidm does without."""
    found = []
    if data.flag("rescaled", True) and data.flag("logit_transform"):
        found.append("logit_transform true is passed over: rescaled comes first")
    for name in ("uniform_dequantization", "gaussian_dequantization"):
        if data.flag(name):
            found.append(f"{name} true is passed over: bidm's training images get no such noise")
    return [left_out(f"{note} ({data.where})") for note in found]


def _schedule(diffusion: Section) -> NoiseSchedule:
    """ddim's schedules; pesser's names for the same numbers count too."""
    kind = diffusion.text("beta_schedule", "linear")
    start = first(Section.number, (diffusion, "beta_start"), (diffusion, "beta_0")) or 1e-4
    end = first(Section.number, (diffusion, "beta_end"), (diffusion, "beta_T")) or 0.02
    names = ("num_diffusion_timesteps", "timesteps", "T", "steps")
    timesteps = first(Section.integer, *((diffusion, name) for name in names)) or 1000
    check_schedule(diffusion.where, start, end, timesteps)
    if kind == "linear":
        return NoiseSchedule.linear(timesteps, start, end)
    if kind == "quad":
        return NoiseSchedule.scaled_linear(timesteps, start, end)
    if kind == "const":
        betas = torch.full((timesteps,), end, dtype=torch.float64)
    elif kind == "jsd":
        betas = 1.0 / torch.linspace(timesteps, 1, timesteps, dtype=torch.float64)
    elif kind == "sigmoid":
        betas = torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid() * (end - start) + start
    else:
        raise diffusion.wrong("beta_schedule", "linear, quad, const, jsd or sigmoid", kind)
    return NoiseSchedule.explicit((1 - betas).cumprod(0))


def assumed_size(arguments: dict[str, Any], notes: list[str]) -> int:
    """Image size from where the attention is: at 16x16 in every published network."""
    levels = arguments["attention_levels"]
    size = 16 * 2 ** levels[0] if levels else 32
    reason = "attention at 16x16 as in the published networks" if levels else "no attention to tell by"
    notes.append(assumed(f"size {size}x{size} (assumed: {reason}; override with `settings` image_size=N)"))
    return size


def _variance(settings: DDPMSettings, size: int, notes: list[str]) -> Variance:
    if settings.is_ddim:
        notes.append("ancestral sampling: ermongroup's ddpm_noisy (a list checkpoint or ddim configuration)")
        return "ddim_noisy"
    if settings.variance is not None:
        return settings.variance
    variance: Variance = "small" if size >= 256 else "large"
    reason = f"assumed, as the published {size}x{size} networks"
    override = "override with `settings` variance=small or large"
    notes.append(assumed(f"ancestral sampling: fixed{variance} variance ({reason}; {override})"))
    return variance


def ddpm_unet_arguments(model: Section, image_size: int) -> dict[str, Any]:
    """Arguments from the original constructor's; attention sits where the size is in ``attn_resolutions``."""
    multiples = model.numbers("ch_mult")
    resolutions = model.numbers("attn_resolutions")
    in_channels = model.integer("in_channels", 3)
    out_channels = model.get("out_ch", None) or model.get("out_channels", in_channels)
    return {
        "in_channels": in_channels,
        "out_channels": Section({"out_ch": out_channels}, model.where).integer("out_ch"),
        "ch": model.integer("ch"),
        "ch_mult": multiples,
        "num_res_blocks": model.integer("num_res_blocks"),
        "attention_levels": [i for i in range(len(multiples)) if image_size // 2**i in resolutions],
        "resamp_with_conv": model.flag("resamp_with_conv", True),
        "conv_shortcut": model.flag("conv_shortcut", False),
        "dropout": model.number("dropout", 0.0),
    }


@inferring("U-Net")
def infer_ddpm_unet(shapes: Shapes) -> dict[str, Any]:
    """Arguments of :class:`DDPMUNet` from the weights without any prefix; they hide its dropout alone."""
    arguments = encoder_arguments(shapes, "")
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        **arguments,
        "resamp_with_conv": len(arguments["ch_mult"]) == 1 or "down.0.downsample.conv.weight" in shapes,
        "conv_shortcut": any(name.endswith(".conv_shortcut.weight") for name in shapes),
    }


def original_arguments(arguments: dict[str, Any], size: int) -> dict[str, Any]:
    """The reverse of :func:`ddpm_unet_arguments`, for images of ``size``."""
    return {
        "ch": arguments["ch"],
        "out_ch": arguments["out_channels"],
        "ch_mult": list(arguments["ch_mult"]),
        "num_res_blocks": arguments["num_res_blocks"],
        "attn_resolutions": [size // 2**level for level in arguments["attention_levels"]],
        "dropout": arguments.get("dropout", 0.0),
        "in_channels": arguments["in_channels"],
        "resamp_with_conv": arguments.get("resamp_with_conv", True),
        "conv_shortcut": arguments.get("conv_shortcut", False),
    }


def _config(model: DiffusionModel, is_ddim: bool) -> dict[str, Any]:
    """ermongroup/ddim's .yml, or JSON of the arguments of pesser/pytorch_diffusion's constructors."""
    size, (kind, start, end) = square_side(model), schedule_ends(model, _BETAS)
    network, steps = original_arguments(model.architecture["unet"]["args"], size), model.schedule.timesteps
    values = {"rescaled": value_range(model) is None, "logit_transform": value_range(model) == "logit"}
    if is_ddim:
        betas = {
            "beta_schedule": kind,
            "beta_start": start,
            "beta_end": end,
            "num_diffusion_timesteps": steps,
        }
        return {
            "data": {"image_size": size, "channels": model.sample_shape[0], **values},
            "model": {"type": "simple", "var_type": "fixedlarge", "ema": True, **network},
            "diffusion": betas,
        }
    betas = {"beta_schedule": kind, "beta_0": start, "beta_T": end, "T": steps}
    variance = "fixedsmall" if model.convention.variance == "small" else "fixedlarge"
    data = {} if values["rescaled"] else {"data": values}
    network = {"resolution": size, **network}
    return {"unet": network, "diffusion": betas | {"model_var_type": variance}, **data}
