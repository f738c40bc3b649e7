"""Conditions of an LDM: its conditioner (``cond_stage_model``), and noise on an upscaler's small image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bidm_cli.checkpoints.evidence import assumed, left_out
from bidm_cli.checkpoints.first_stages.compvis import Architecture
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.schedules import one_line, schedule_from_buffers
from bidm_cli.checkpoints.reading.state import load_strictly, with_prefix
from bidm_cli.diffusion.augmentation import NoiseAugmentation
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

CONDITIONER = "cond_stage_model."
_LEVELS = 350
"""Noise levels of the published upscaler."""


@dataclass(frozen=True)
class Conditioner:
    """Conditioner of a configuration: architecture of an embedder or rescaler, and the name of any class.

    ``has_null_label``: labels are dropped in training (``ucg_rate``, Stability's code), to the last row.
    """

    architecture: Architecture | None = None
    name: str = ""
    has_null_label: bool = False


def read_conditioner(params: Section) -> Conditioner:
    """``cond_stage_config`` of ``model.params``."""
    value = params.get("cond_stage_config", "__is_unconditional__")
    if isinstance(value, str):
        return Conditioner(name="" if value == "__is_unconditional__" else value.strip("_"))
    section = params.section("cond_stage_config")
    name = section.text("target").rpartition(".")[2]
    settings = section.section("params")
    if name == "SpatialRescaler":
        return Conditioner({"kind": "spatial_rescaler", "args": _rescaler_arguments(settings)}, name)
    if name != "ClassEmbedder":
        return Conditioner(None, name)
    architecture = _embedder(settings.integer("n_classes", 1000), settings.integer("embed_dim"))
    return Conditioner(architecture, name, settings.number("ucg_rate", 0.0) > 0)


def _embedder(rows: int, width: int) -> Architecture:
    return {"kind": "class_embedder", "args": {"n_classes": rows, "embed_dim": width}}


def _rescaler_arguments(params: Section) -> dict[str, Any]:
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


def load_conditioner(
    tensors: dict[str, Tensor], configured: Conditioner, origin: str, notes: list[str]
) -> tuple[Architecture | None, nn.Module | None]:
    """(architecture, network) of a class embedder or rescaler; (None, None) of anything else, which is noted.

    ``tensors`` is the whole state dict; ``origin`` says where the architecture comes from, for messages.
    """
    weights, architecture = with_prefix(tensors, CONDITIONER), configured.architecture
    rescaler = weights.get("channel_mapper.weight")
    if set(weights) == {"embedding.weight"} and weights["embedding.weight"].dim() == 2:
        architecture = architecture or _embedder(*weights["embedding.weight"].shape)
        network = load_strictly(architecture, weights, "class embedder", origin=origin)
    elif rescaler is not None and rescaler.dim() == 4:
        if architecture is None or architecture["kind"] != "spatial_rescaler":
            rows, classes = rescaler.shape[:2]
            arguments: dict[str, Any] = {"n_stages": 2, "in_channels": classes, "out_channels": rows}
            arguments |= {"method": "bilinear", "multiplier": 0.5, "bias": "channel_mapper.bias" in weights}
            architecture = {"kind": "spatial_rescaler", "args": arguments}
            reason = "assumed, as LDM's semantic synthesis"
            notes.append(assumed(f"segmentation maps are halved twice, bilinearly ({reason})"))
        network = load_strictly(architecture, weights, "segmentation rescaler", origin=origin)
        classes = architecture["args"]["in_channels"]
        notes.append(f"conditioner: segmentation maps of {classes} classes, rescaled")
    else:
        if architecture is not None:
            notes.append(left_out("no class embedder: the configuration names one, the file has none"))
        elif weights and "encoder.conv_in.weight" not in weights:
            notes.append(
                f"conditioner {configured.name or '(unknown kind)'}: give embeddings (`context`) or, if it "
                "encodes text, prompts (`prompt`)"
            )
        return None, None
    return architecture, network.requires_grad_(False)


@dataclass(frozen=True)
class LowScale:
    """Noise on the small image, of a configuration; ``schedule`` is None where it is taken without noise."""

    schedule: NoiseSchedule | None
    levels: int


def read_low_scale(model: Section) -> LowScale | None:
    """``low_scale_config`` of ``model.params``, as Stability's upscalers have it; None if there is none."""
    if "low_scale_config" not in model:
        return None
    section = model.section("low_scale_config")
    name = section.text("target").rpartition(".")[2]
    if name == "SimpleImageConcat":
        return LowScale(None, 1)
    if name != "ImageConcatWithNoiseAugmentation":
        raise BidmError(f"{section.where}: the low-resolution model {name!r} is not supported")
    params = section.section("params")
    schedule = params.section("noise_schedule_config")
    kind = schedule.text("beta_schedule", "linear")
    timesteps = schedule.integer("timesteps", 1000)
    ends = (schedule.number("linear_start", 1e-4), schedule.number("linear_end", 2e-2))
    if kind != "linear" or not 2 <= timesteps <= 100_000 or not 0 < ends[0] <= ends[1] < 1:
        raise BidmError(f"{schedule.where}: no schedule of noise levels that bidm knows ({kind})")
    levels = params.integer("max_noise_level", 1000)
    if not 1 <= levels <= timesteps:
        raise params.wrong("max_noise_level", f"1 to {timesteps}", levels)
    return LowScale(NoiseSchedule.scaled_linear(timesteps, *ends), levels)


def augmentation_of(
    configured: LowScale | None, tensors: Mapping[str, Tensor], notes: list[str]
) -> NoiseAugmentation | None:
    """The noise of a model's small images; the file's buffers come before the configuration."""
    schedule = None if configured is None else configured.schedule
    found = schedule_from_buffers(with_prefix(tensors, "low_scale_model."), schedule)
    if found is not None:
        schedule = found[0]
    if schedule is None:
        return None
    levels = min(_LEVELS if configured is None else configured.levels, schedule.timesteps)
    reason = ", assumed, as the published one" if configured is None else ""
    line = f"the small image gets noise of the level that the label says, 0 to {levels - 1} "
    line += f"({one_line(schedule)}{reason})"
    notes.append(assumed(line) if configured is None else line)
    return NoiseAugmentation(schedule, levels)
