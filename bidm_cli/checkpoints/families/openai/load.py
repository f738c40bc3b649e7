"""OpenAI's improved-diffusion and guided-diffusion: bare state dicts (modelNNNNNN.pt, ema_RATE_NNNNNN.pt),
and JSON of constructor arguments alone.

Names and shapes give the architecture but for the attention heads; those, the schedule and the rest come from
a configuration, from :mod:`bidm_cli.checkpoints.families.openai.published`, or from a rule, and are noted. Both code bases
clip x0 and take the noise from the clipped x0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import Detected
from bidm_cli.checkpoints.families.ldm.published import known_network
from bidm_cli.checkpoints.families.openai.config import OpenAISettings, read_settings, schedule_of
from bidm_cli.checkpoints.families.openai.infer import infer_unet
from bidm_cli.checkpoints.families.openai.published import Assumed, assume
from bidm_cli.checkpoints.reading.config import Config
from bidm_cli.checkpoints.reading.schedules import one_line
from bidm_cli.checkpoints.reading.state import Weights, load_strictly, on_meta, shapes_of
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.errors import BidmError

_EMA = re.compile(r"(?<![a-z])ema(?![a-z])")
_OVERRIDE = "override with --config or --set"


def load(detected: Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
    """A :class:`Checkpoint` from a file found to be of this family.

    Raises:
        BidmError: weights and architecture do not fit, or settings make no sense.
    """
    notes = list(detected.evidence)
    settings = OpenAISettings() if config is None else read_settings(config)
    origin = "inferred from names and shapes" if config is None else f"from {config.path}"
    notes.append(f"architecture {origin}")
    chosen, averaged = _choose(detected.weights, ema, source, notes)
    assumed, arguments = None, settings.unet
    if arguments is None:
        arguments = infer_unet(shapes_of(chosen.tensors))
        assumed = assume(arguments)
        _note_heads(arguments, assumed, notes)
        arguments |= assumed.heads
        if assumed.new_order:
            arguments["use_new_attention_order"] = True
    unet = load_strictly({"kind": "ldm_unet", "args": arguments}, chosen.tensors, "U-Net", origin=origin)
    return _assemble(settings, assumed, arguments, unet, notes, source=source, ema=averaged)


def from_config(config: Config) -> Checkpoint:
    """The network of a bare configuration, on the meta device.

    Raises:
        BidmError: settings are missing or make no sense.
    """
    settings = read_settings(config)
    assert settings.unet is not None
    notes = [f"family openai: configuration {config.path}; no weights"]
    unet = on_meta({"kind": "ldm_unet", "args": settings.unet})
    return _assemble(settings, None, settings.unet, unet, notes, source=config.path, has_weights=False)


def _assemble(
    settings: OpenAISettings,
    assumed: Assumed | None,
    arguments: dict[str, Any],
    unet: torch.nn.Module,
    notes: list[str],
    **about: Any,
) -> Checkpoint:
    assumed = assumed or assume(arguments)
    channels, learned = _channels(arguments, notes)
    size = settings.image_size
    if size is None:
        size = assumed.image_size
        notes.append(f"size {size}x{size} ({assumed.reason}; {_OVERRIDE} image_size=N)")
    schedule, rescale, reason = settings.schedule, bool(settings.rescale), "from the configuration"
    if schedule is None:
        schedule = schedule_of(assumed.schedule, assumed.timesteps)
        rescale, reason = assumed.rescale, f"{assumed.reason}; {_OVERRIDE} beta_schedule=..., timesteps"
    notes.append(f"schedule: {one_line(schedule)} ({reason})")
    time_scale = 1000 / schedule.timesteps if rescale else 1.0
    time = f"the network sees t * {time_scale:g}" if rescale else "not rescaled"
    notes.append(f"time: {time} (override with --set rescale_timesteps={str(not rescale).lower()})")
    classes = arguments.get("num_classes")
    if classes is not None:
        notes.append(f"classes: {classes}, none of them for 'no class': no classifier-free guidance")
    checkpoint = Checkpoint(
        family="openai",
        unet=unet,
        architecture={
            "unet": {"kind": "ldm_unet", "args": arguments},
            "first_stage": None,
            "conditioner": None,
        },
        sample_shape=(channels, size, size),
        schedule=schedule,
        convention=SamplingConvention(
            spacing="openai_ddim",
            final_alpha="one",
            clip="rederive",
            clip_ancestral=True,
            variance="learned_range" if learned else settings.fixed_variance,
            rounding="truncate",
        ),
        prediction=settings.prediction,
        num_classes=classes,
        time_scale=time_scale,
        evidence=notes,
        **about,
    )
    if arguments["in_channels"] > channels:
        notes.append(
            f"conditioned by concatenation: {arguments['in_channels'] - channels} channels besides the "
            f"{channels}"
        )
    return checkpoint


def _channels(arguments: dict[str, Any], notes: list[str]) -> tuple[int, bool]:
    """(channels of the image, whether the network also predicts the variance).

    An upsampler sees the small image as well: 6 channels in; 6 out mean 3 and their variance.
    """
    inputs, outputs = arguments["in_channels"], arguments["out_channels"]
    if outputs == 2 * inputs or (inputs == outputs == 6):
        notes.append(
            f"learned variance: {outputs} channels out for images of {outputs // 2} "
            f"({_OVERRIDE} learn_sigma=false)"
        )
        return outputs // 2, True
    if outputs in (inputs, inputs // 2):
        notes.append(
            f"fixed variance: the network predicts no more than the noise (or x0: {_OVERRIDE} prediction=x0)"
        )
        return outputs, False
    raise BidmError(
        f"a network with {inputs} channels in and {outputs} out is no diffusion model of this family; "
        "give its configuration with --config"
    )


def _note_heads(arguments: dict[str, Any], assumed: Assumed, notes: list[str]) -> None:
    words = {"num_head_channels": "channels a head", "num_heads": "a layer"}
    (name, number), *_ = assumed.heads.items()
    order = "new" if assumed.new_order else "legacy"
    notes.append(
        f"attention heads: {number} {words[name]}, {order} order of q, k, v ({assumed.reason}; {_OVERRIDE} "
        f"{name}=N, use_new_attention_order=true)"
    )
    latent = known_network(arguments)
    if latent is not None:
        notes.append(
            f"its shapes are also those of LDM's {latent.name}; if it is that, give LDM's config.yaml with "
            "--config"
        )


def _choose(found: list[Weights], ema: bool, source: Path, notes: list[str]) -> tuple[Weights, bool]:
    """(the state dict to load, whether it is an averaged one); OpenAI keeps one state dict a file."""
    averaged = [weights for weights in found if weights.is_average]
    trained = [weights for weights in found if weights not in averaged]
    if not trained and not ema:
        raise BidmError("the file holds averaged (EMA) weights alone; load it with them")
    if averaged and (ema or not trained):
        notes.append(f"weights: EMA ({averaged[-1].where})")
        return averaged[-1], True
    if _EMA.search(source.name.lower()):
        notes.append(f"weights: EMA (by the file's name, {source.name})")
        if not ema:
            notes.append("weights as trained were asked for: they are in another file, modelNNNNNN.pt")
        return trained[0], True
    notes.append("weights: as trained, or final (the file does not say)")
    beside = _averaged_beside(source)
    if beside is not None:
        notes.append(f"averaged (EMA) weights of the same step are in {beside.name}; load that file for them")
    return trained[0], False


def _averaged_beside(source: Path) -> Path | None:
    """``ema_RATE_NNNNNN.pt`` of the same step as ``modelNNNNNN.pt``, the highest rate."""
    match = re.fullmatch(r"model(\d+)\.(pt|safetensors)", source.name)
    if match is None:
        return None
    return max(source.parent.glob(f"ema_*_{match[1]}.{match[2]}"), default=None)
