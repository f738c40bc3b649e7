"""Latent diffusion (CompVis): Lightning files, pruned files and bare state dicts, and config.yaml alone.

The configuration decides where there is one. Otherwise names and shapes give the architecture, the file's
buffers the schedule, and :mod:`bidm_cli.checkpoints.families.published` what is in neither; each
assumption is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed, left_out
from bidm_cli.checkpoints.families import ddpm
from bidm_cli.checkpoints.families.ldm.conditions import (
    CONDITIONER,
    Conditioner,
    augmentation_of,
    load_conditioner,
)
from bidm_cli.checkpoints.families.ldm.config import LDMSettings, read_settings
from bidm_cli.checkpoints.families.ldm.export import write_ldm
from bidm_cli.checkpoints.families.openai.config import is_openai
from bidm_cli.checkpoints.families.openai.infer import NAMES, infer_unet
from bidm_cli.checkpoints.families.published import KnownNetwork, assume_heads, heads_text, known_network
from bidm_cli.checkpoints.first_stages import compvis as first_stages
from bidm_cli.checkpoints.first_stages.compvis import Architecture
from bidm_cli.checkpoints.reading.averages import dotted
from bidm_cli.checkpoints.reading.config import Config
from bidm_cli.checkpoints.reading.schedules import one_line, schedule_from_buffers
from bidm_cli.checkpoints.reading.state import Weights, load_strictly, on_meta, shapes_of, with_prefix
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_UNET = "model.diffusion_model."
_EMA = "model_ema.diffusion_model"
_FIRST_STAGE = "first_stage_model."
_CIN_ROWS = 1001
"""Rows of cin256-v2's class embedder: ImageNet's classes, and one for "no class"."""


@base.register_family
class LDM(base.Family):
    """CompVis/latent-diffusion, Stable Diffusion and what followed in their code."""

    signature = base.Signature(
        "ldm",
        "latent diffusion (CompVis)",
        (
            tuple(_UNET + name for name in NAMES),
            tuple(_UNET + name for name in ddpm.NAMES),
            tuple(_EMA + name.replace(".", "") for name in NAMES),
        ),
    )
    exports_first_stage = True

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        model, network = values.get("model"), base.network_section(values)
        params = model.get("params") if isinstance(model, dict) else None
        if isinstance(params, dict):
            return "yaml" if "unet_config" in params else None
        others = "_class_name" in values or is_openai(values) or "attn" in network
        return "arguments" if "model_channels" in network and not others else None

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        settings = LDMSettings() if config is None else read_settings(config)
        notes.extend(settings.notes)
        origin = base.INFERRED if config is None else f"from {config.path}"
        notes.append(f"architecture {origin}")
        found = [_with_dots(weights, settings) for weights in detected.weights]
        choice = base.choose_weights(found, ema, notes, source=source)
        tensors = choice.weights.tensors
        if not any(name.startswith(_UNET) for name in tensors):
            tensors = {_UNET + name: tensor for name, tensor in tensors.items()}

        architecture: dict[str, Any] = {"unet": _unet_architecture(tensors, settings, notes)}
        weights = with_prefix(tensors, _UNET)
        spare = {name.removeprefix(_UNET) for name in choice.spare}
        unet = load_strictly(
            architecture["unet"], weights, "U-Net", origin=origin, ignored=spare.__contains__
        )
        architecture["first_stage"], first_stage = _load_first_stage(tensors, settings, origin, notes)
        conditions, conditioner = load_conditioner(tensors, settings.conditioner, origin, notes)
        architecture["conditioner"] = conditions
        networks = (unet, first_stage, conditioner)
        about = {"source": source, "ema": choice.averaged}
        return _assemble(settings, architecture, networks, tensors, notes, **about)

    def from_config(self, config: Config) -> Checkpoint:
        settings = read_settings(config)
        notes = [f"family ldm: configuration {config.path}; no weights", *settings.notes]
        first_stage, conditioner = settings.first_stage, settings.conditioner.architecture
        architecture = {"unet": settings.unet, "first_stage": first_stage, "conditioner": conditioner}
        networks = tuple(None if part is None else on_meta(part) for part in architecture.values())
        return _assemble(settings, architecture, networks, {}, notes, source=config.path, has_weights=False)

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        return write_ldm(model, weights, path)


def _assemble(
    settings: LDMSettings,
    architecture: dict[str, Any],
    networks: tuple[nn.Module | None, ...],
    tensors: dict[str, Tensor],
    notes: list[str],
    **about: Any,
) -> Checkpoint:
    unet, first_stage, conditioner = networks
    assert unet is not None
    arguments = architecture["unet"]["args"]
    known = known_network(arguments) if architecture["unet"]["kind"] == "ldm_unet" else None
    learned = base.has_learned_variance(arguments, notes)
    classes, null = _classes(arguments, architecture["conditioner"], settings.conditioner, notes)
    augmentation = augmentation_of(settings.low_scale, tensors, notes)
    if augmentation is not None or settings.low_scale is not None:
        classes = augmentation.levels if augmentation is not None else 1
    checkpoint = Checkpoint(
        family="ldm",
        unet=unet,
        first_stage=first_stage,
        conditioner=conditioner,
        architecture=architecture,
        sample_shape=_sample_shape(settings, architecture, known, learned, notes),
        schedule=_schedule(settings, tensors, known, notes),
        scale_factor=_scale_factor(settings, tensors, known, architecture["first_stage"], notes),
        convention=SamplingConvention(
            spacing="ldm",
            final_alpha="first",
            clip_ancestral=not settings.latent and settings.clips,
            variance="learned_range" if learned else "large" if settings.v_posterior == 1 else "small",
            rounding="truncate",
        ),
        prediction=settings.prediction or (known.prediction if known else "epsilon"),
        augmentation=augmentation,
        num_classes=classes,
        null_label=null,
        latent=first_stage is None and _is_latent(settings, tensors, known, notes),
        evidence=notes,
        **about,
    )
    if settings.prediction is None:
        words, others = ("v", "epsilon or x0") if checkpoint.prediction == "v" else ("the noise", "v or x0")
        reason = f"assumed, as {known.name}" if known else "assumed, as LDM's published models"
        override = f"override with `settings` prediction={others}"
        notes.append(assumed(f"the network predicts {words} ({reason}; {override})"))
    base.note_concatenation(checkpoint, notes)
    if not checkpoint.embeds_labels and checkpoint.context_width is not None:
        name = f" ({settings.conditioner.name})" if settings.conditioner.name else ""
        notes.append(f"attends to a context of width {arguments['context_dim']}{name}, to be given")
    return checkpoint


def _with_dots(weights: Weights, settings: LDMSettings) -> Weights:
    """``weights``, whose averages get their dots back if they are all there is (a file of averages alone).

    LDM stores the average of ``model.diffusion_model.a.b`` as ``model_ema.diffusion_modelab``.
    """
    if any(name.startswith(_UNET) for name in weights.tensors):
        return weights
    short = {name: tensor for name, tensor in weights.tensors.items() if name.startswith(_EMA)}
    if not short:
        return weights
    if settings.unet is None:
        raise BidmError(
            "the file holds averaged weights alone, whose names have lost their dots; give its configuration "
            "with `config`"
        )
    full = dotted(on_meta(settings.unet).state_dict())
    named = {full.get(key.removeprefix(_EMA)): key for key in short}
    orphans = tuple(key.removeprefix("model_ema.") for key in short if key.removeprefix(_EMA) not in full)
    rest = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("model_ema.")}
    averages = {_UNET + name: short[key] for name, key in named.items() if name is not None}
    return Weights("model_ema", rest | averages, averaged=True, orphans=orphans)


def _unet_architecture(tensors: dict[str, Tensor], settings: LDMSettings, notes: list[str]) -> Architecture:
    if settings.unet is not None:
        return settings.unet
    shapes = shapes_of(with_prefix(tensors, _UNET))
    if "conv_in.weight" in shapes:
        return {"kind": "ddpm_unet", "args": ddpm.infer_ddpm_unet(shapes)}
    arguments = infer_unet(shapes)
    has_classes = f"{CONDITIONER}embedding.weight" in tensors
    heads, reason = assume_heads(arguments, has_classes)
    override = f"override with `settings` {next(iter(heads))}=N"
    notes.append(assumed(f"attention heads: {heads_text(heads)} ({reason}; {override})"))
    return {"kind": "ldm_unet", "args": arguments | heads}


def _load_first_stage(
    tensors: dict[str, Tensor], settings: LDMSettings, origin: str, notes: list[str]
) -> tuple[Architecture | None, nn.Module | None]:
    weights = with_prefix(tensors, _FIRST_STAGE)
    weights = {name: value for name, value in weights.items() if not first_stages.is_left_over(name)}
    if not weights:
        if settings.names_first_stage:
            missing = "the configuration names one, the file has none: give it with `first_stage`, or sample"
            notes.append(left_out(f"no first stage: {missing} latents with `raw`"))
        return None, None
    architecture = settings.first_stage
    if architecture is None:
        architecture, origin = first_stages.infer_first_stage(shapes_of(weights)), base.INFERRED
    network = load_strictly(architecture, weights, "first stage", origin=origin)
    notes.append(f"first stage: {first_stages.one_line(architecture)}")
    return architecture, network.requires_grad_(False)


def _schedule(
    settings: LDMSettings, tensors: dict[str, Tensor], known: KnownNetwork | None, notes: list[str]
) -> NoiseSchedule:
    found = schedule_from_buffers(tensors, settings.schedule)
    if found is not None:
        schedule, reason = found
    elif settings.schedule is not None:
        schedule, reason = settings.schedule, "from the configuration"
        notes.extend(settings.defaults)
    else:
        schedule = NoiseSchedule.scaled_linear(1000, *(known.betas if known else (0.0015, 0.0195)))
        reason = f"assumed, as {known.name if known else 'most LDM networks'}; {base.SET_SCHEDULE}"
    line = f"schedule: {one_line(schedule)} ({reason})"
    notes.append(assumed(line) if reason.startswith("assumed") else line)
    return schedule


def _scale_factor(
    settings: LDMSettings,
    tensors: dict[str, Tensor],
    known: KnownNetwork | None,
    first_stage: Architecture | None,
    notes: list[str],
) -> float:
    buffer = tensors.get("scale_factor")
    if buffer is not None and buffer.numel() == 1:
        value, reason = float(buffer.reshape(())), "from the file"
    elif settings.scale_factor is not None:
        value, reason = settings.scale_factor, "from the configuration"
        if settings.scale_by_std and tensors:
            reason += ", which says the file holds it: it does not"
    else:
        is_kl = first_stage is not None and first_stage["kind"] == "kl_first_stage"
        value = known.scale_factor if known and is_kl else 1.0
        reason = "assumed; override with `settings` scale_factor=S"
    if not 0 < abs(value) < float("inf"):
        raise BidmError(
            f"the scale factor of the latents is {value} ({reason}); it has to be a number above 0"
        )
    if first_stage is not None:
        line = f"latents are scaled by {value:g} ({reason})"
        said = buffer is not None or settings.scale_factor is not None
        notes.append(line if said and not (settings.scale_by_std and buffer is None) else assumed(line))
    return value


def _sample_shape(
    settings: LDMSettings,
    architecture: dict[str, Any],
    known: KnownNetwork | None,
    learned: bool,
    notes: list[str],
) -> tuple[int, int, int]:
    arguments, first_stage = architecture["unet"]["args"], architecture["first_stage"]
    channels = arguments["in_channels" if learned else "out_channels"]
    if first_stage and not learned:
        channels = first_stage["args"]["embed_dim"]
    channels = base.channels_of(int(channels), settings.channels, settings.where, notes)
    size = settings.image_size
    if size is None:
        side, reason = 64, "assumed"
        if known is not None:
            side, reason = known.image_size, f"as {known.name}"
        elif first_stage is not None:
            side = max(256 // first_stages.reduction(first_stage), 1)
            reason = "assumed, for images of 256x256"
        size = side, side
        notes.append(assumed(f"size {side}x{side} ({reason}; override with `settings` image_size=N)"))
    return channels, *size


def _classes(
    unet: dict[str, Any], conditioner: Architecture | None, configured: Conditioner, notes: list[str]
) -> tuple[int | None, int | None]:
    """(number of labels, the label that means none).

    LDM's code has no label for "no class"; cin256-v2 was trained with a row more than ImageNet has classes.
    """
    if conditioner is None or conditioner["kind"] != "class_embedder":
        return unet.get("num_classes"), None
    rows = conditioner["args"]["n_classes"]
    if rows == _CIN_ROWS or configured.has_null_label:
        reason = "as in cin256-v2" if rows == _CIN_ROWS else "ucg_rate in the configuration"
        notes.append(
            f"classes: {rows}, the last one ({rows - 1}) for 'no class' ({reason}; override with `settings` "
            "null_label=none)"
        )
        return rows, rows - 1
    notes.append(
        f"classes: {rows}, none of them for 'no class': no classifier-free guidance (override with "
        "`settings` null_label=N)"
    )
    return rows, None


def _is_latent(
    settings: LDMSettings, tensors: dict[str, Tensor], known: KnownNetwork | None, notes: list[str]
) -> bool:
    """True if a model without its first stage is of latents all the same; noted."""
    if settings.names_first_stage:
        return True
    if not settings.latent:
        return False
    conditioned = any(name.startswith(CONDITIONER) for name in tensors)
    if known is not None:
        reason = f"its shapes are those of LDM's {known.name}"
    elif conditioned or "scale_factor" in tensors:
        reason = f"the file has a {'conditioner' if conditioned else 'scale of latents'}"
    else:
        return False
    notes.append(
        assumed(
            f"no first stage: it denoises latents (assumed: {reason}; give the first stage with "
            "`first_stage`, or override with `settings` latent=false)"
        )
    )
    return True
