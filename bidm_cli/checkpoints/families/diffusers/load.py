"""diffusers folders: ``model_index.json`` with unet/, vae/ or vqvae/, scheduler/, or all of it in the root.

``config.json`` says everything of the networks; the scheduler's configuration gives schedule, spacing and
clipping. Weights load under their own names, a ``UNet2DModel``'s into
:class:`bidm_cli.networks.diffusers.unet.DiffusersUNet`, a ``UNet2DConditionModel``'s into
:class:`bidm_cli.networks.diffusers.condition_unet.DiffusersConditionUNet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed, left_out
from bidm_cli.checkpoints.families.diffusers import files
from bidm_cli.checkpoints.families.diffusers.config import (
    condition_unet_from_config,
    first_stage_from_config,
    unet_from_config,
)
from bidm_cli.checkpoints.families.diffusers.export import export_folder
from bidm_cli.checkpoints.families.diffusers.scheduler import SchedulerSettings, read_scheduler
from bidm_cli.checkpoints.first_stages.compvis import Architecture, latent_channels, reduction
from bidm_cli.checkpoints.reading.config import Config, Section
from bidm_cli.checkpoints.reading.schedules import one_line
from bidm_cli.checkpoints.reading.state import load_strictly, on_meta
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError

_TIME = "time_embedding.linear_1.weight"
_LEARNED = ("learned_range", "learned")
_LDM_UNET = {
    "_class_name": "UNet2DModel", "block_out_channels": [224, 448, 672, 896], "sample_size": 64,
    "attention_head_dim": 32, "in_channels": 3,
}  # fmt: skip
"""Settings of CompVis/ldm-celebahq-256, whose latents have as many channels as pixels."""
FirstStage = tuple[Architecture, nn.Module, float]


@base.register_family
class Diffusers(base.Family):
    """Hugging Face diffusers: UNet2DModel and UNet2DConditionModel."""

    signature = base.Signature(
        "diffusers",
        "a diffusers network",
        (
            (_TIME, "down_blocks.0.resnets.0.norm1.weight", "conv_in.weight"),
            ("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight"),
        ),
    )
    exports_first_stage = True
    reads_folders = True

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        return "json" if "_class_name" in values else None

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        """From one weights file: its folder says the rest."""
        return _load(root_of(source.parent), config, ema, source, detected)

    def load_folder(self, root: Path, config: Config | None, ema: bool) -> Checkpoint:
        """From a folder, or one of its components'; ``config`` is a U-Net's, to use for the folder's."""
        return _load(root_of(root), config, ema)

    def from_config(self, config: Config) -> Checkpoint:
        """From a ``config.json`` and what lies beside it."""
        found = files.Component(config.path.parent, config.root)
        root = root_of(config.path.parent)
        notes = [f"family diffusers: configuration {config.path}; no weights"]
        architecture = _unet_architecture(found)
        first_stage = _first_stage(root, notes, weights=False)
        return _assemble(root, found, architecture, on_meta(architecture), first_stage, notes,
                         source=config.path, has_weights=False)  # fmt: skip

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write the folder ``path``; returns its ``unet/config.json``."""
        return export_folder(model, weights, path)


def root_of(folder: Path) -> Path:
    """The whole model's folder, if ``folder`` is one of its components."""
    whole = (folder.parent / "model_index.json").is_file() or (folder.parent / "scheduler").is_dir()
    return folder.parent if whole and (folder / "config.json").is_file() else folder


def _load(
    root: Path,
    config: Config | None,
    ema: bool,
    source: Path | None = None,
    detected: base.Detected | None = None,
) -> Checkpoint:
    notes = [f"family diffusers: the folder {root}"] if detected is None else detected.evidence
    found = files.component(root, (*files.AVERAGES, "unet") if ema else ("unet",), files.UNETS)
    if source is not None and (source.parent / "config.json").is_file():
        found = files.component(source.parent, (), files.UNETS)
    if config is not None:
        folder = found.folder if found else source.parent if source else root
        found = files.Component(folder, config.root)
    if found is None:
        place = source.parent if source else root
        names = detected.weights[0].tensors if detected else {_TIME: None}
        if files.component(place, (), files.FIRST_STAGES) or _TIME not in names:
            raise base.FirstStageAlone(source or root)
        raise BidmError(_not_diffusers(place, source))
    if found.class_name in files.FIRST_STAGES:
        raise base.FirstStageAlone(source or found.folder)
    path = source or files.weights_file(found.folder, ema)
    architecture = _unet_architecture(found)
    notes.append(f"architecture from {found.config.where}")
    weights = [] if detected is None else detected.weights
    weights = weights or files.state_dicts_of(path, Diffusers.signature.alternatives, notes)
    known = files.says_averaged(path, found)
    choice = base.choose_weights(weights, ema, notes, source=path, known=known)
    tensors, origin = files.renamed(choice.weights.tensors), f"from {found.config.where}"
    unet = load_strictly(architecture, tensors, "U-Net", origin=origin, ignored=choice.spare.__contains__)
    first_stage = _first_stage(root, notes)
    return _assemble(root, found, architecture, unet, first_stage, notes, source=path, ema=choice.averaged)


def _not_diffusers(root: Path, source: Path | None = None) -> str:
    if source is not None:
        return (
            f"{source} has no config.json beside it, which says what network it is; put it there, or give it "
            "with `config`"
        )
    others = files.denoisers(root)
    if others:
        return f"{root} is a model of {others}; bidm loads {' and '.join(files.UNETS)}"
    if not any(root.glob("*.json")) and not (root / "unet").is_dir():
        return (
            f"{root} is a folder that diffusers did not write (no config.json, no unet/); name the file in it"
        )
    return f"{root} has no unet/config.json and no config.json of a U-Net; download the whole folder"


def _unet_architecture(found: files.Component) -> Architecture:
    if found.class_name not in files.UNETS:
        raise BidmError(
            f"{found.config.where}: a diffusers network of the class {found.class_name or '(none named)'} "
            f"cannot be loaded; bidm loads {', '.join(files.UNETS)}"
        )
    if found.class_name == "UNet2DConditionModel":
        return condition_unet_from_config(found.config)
    return unet_from_config(found.config)


def _first_stage(root: Path, notes: list[str], weights: bool = True) -> FirstStage | None:
    found = files.in_pipeline(root, ("vqvae", "vae"), files.FIRST_STAGES)
    if found is None:
        return None
    architecture, scale, reason = first_stage_from_config(found.config)
    network = on_meta(architecture)
    if weights:
        tensors = files.read_weights(files.weights_file(found.folder))
        network = load_strictly(architecture, tensors, "first stage", origin=f"from {found.config.where}")
    if not 0 < abs(scale) < float("inf"):
        raise BidmError(f"{found.config.where}: scaling_factor is {scale}; it has to be a number above 0")
    place = "" if found.folder.parent == root else f", from {found.folder}"
    notes.append(f"first stage: {found.class_name}, f{reduction(architecture)}{place}")
    note = f"latents are scaled by {scale:g} ({reason})"
    notes.append(note if "scaling_factor" in found.config else assumed(note))
    return architecture, network.requires_grad_(False), scale


def _assemble(
    root: Path,
    found: files.Component,
    architecture: Architecture,
    unet: nn.Module,
    first_stage: FirstStage | None,
    notes: list[str],
    **about: Any,
) -> Checkpoint:
    settings = _scheduler(root, notes)
    arguments = architecture["args"]
    stage, network, scale = first_stage or (None, None, 1.0)
    channels = _channels(arguments, settings, stage)
    learned = arguments["out_channels"] == 2 * channels
    variance = settings.convention.variance
    if learned and variance not in _LEARNED:
        variance = "learned_range"
        notes.append(
            assumed(
                f"learned variance: {arguments['out_channels']} channels out for {channels} (assumed: the "
                "scheduler says nothing of it; override with `settings` variance=learned)"
            )
        )
    elif not learned and variance in _LEARNED:
        variance = "small"
        notes.append(
            left_out("the scheduler asks for a learned variance, the network gives none; fixed_small is used")
        )
    classes, size = arguments.get("num_classes"), _size(found.config, root, stage, notes)
    if arguments.get("class_times"):
        classes = settings.schedule.timesteps
        notes.append(assumed(f"labels are embedded as times are; taken to run from 0 to {classes - 1}"))
    checkpoint = Checkpoint(
        family="diffusers",
        unet=unet,
        first_stage=network,
        architecture={"unet": architecture, "first_stage": stage, "conditioner": None},
        sample_shape=(channels, *size),
        schedule=settings.schedule,
        scale_factor=scale,
        convention=replace(settings.convention, variance=variance),
        prediction=settings.prediction,
        num_classes=classes,
        latent=stage is None and _is_latent(root, found.config, notes),
        evidence=notes,
        **about,
    )
    if checkpoint.context_width is not None:
        notes.append(
            f"attends to a context of width {checkpoint.context_width}, to be given (`context`, or `prompt`)"
        )
    base.note_concatenation(checkpoint, notes)
    return checkpoint


def _is_latent(root: Path, config: Section, notes: list[str]) -> bool:
    """True if a U-Net without its first stage denoises latents all the same; noted."""
    if files.names_first_stage(root):
        missing = "model_index.json names one that is not there: give it with `first_stage`, or sample"
        notes.append(left_out(f"no first stage: {missing} latents with `raw`"))
        return True
    if any(config.values.get(name) != value for name, value in _LDM_UNET.items()):
        return False
    notes.append(
        assumed(
            "no first stage: it denoises latents (assumed: its configuration is that of LDM's CelebA-HQ; "
            "give the first stage with `first_stage`, or override with `settings` latent=false)"
        )
    )
    return True


def _scheduler(root: Path, notes: list[str]) -> SchedulerSettings:
    section = files.scheduler(root)
    settings = read_scheduler(section or Section({}, f"{root}, which has no scheduler_config.json"))
    schedule = f"schedule: {one_line(settings.schedule)}"
    if section is None:
        reason = f"assumed, diffusers' defaults: no scheduler_config.json; {base.SET_SCHEDULE}"
        notes.append(assumed(f"{schedule} ({reason})"))
    else:
        notes.append(f"{schedule} (from {section.where})")
    notes.extend(settings.notes)
    return settings


def _channels(arguments: dict[str, Any], settings: SchedulerSettings, stage: Architecture | None) -> int:
    """Channels of what is denoised: the first stage's, else those that come out less a learned variance."""
    if stage is not None:
        return latent_channels(stage)
    inputs, outputs = arguments["in_channels"], arguments["out_channels"]
    learned = outputs == 2 * inputs or settings.convention.variance in _LEARNED
    return int(outputs // 2 if learned and outputs % 2 == 0 else outputs)


def _size(config: Section, root: Path, stage: Architecture | None, notes: list[str]) -> tuple[int, int]:
    if "sample_size" in config:
        return config.sides("sample_size")
    side, reason = 64, "assumed"
    vae = None if stage is None else files.in_pipeline(root, ("vqvae", "vae"), files.FIRST_STAGES)
    if stage is not None and vae is not None and "sample_size" in vae.config:
        side = max(vae.config.numbers("sample_size")[0] // reduction(stage), 1)
        reason = "by the first stage's"
    missing = "the U-Net's config.json has no sample_size; override with `settings` image_size=N"
    note = f"size {side}x{side} ({reason}: {missing})"
    notes.append(assumed(note) if reason == "assumed" else note)
    return int(side), int(side)
