"""OpenAI's improved-diffusion and guided-diffusion: bare state dicts (modelNNNNNN.pt, ema_RATE_NNNNNN.pt),
and JSON of constructor arguments alone.

Names and shapes give the architecture but for the attention heads; those, the schedule and the rest come from
a configuration, from :mod:`bidm_cli.checkpoints.families.published`, or from a rule, and are noted.
Both code bases clip x0 and take the noise from the clipped x0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed
from bidm_cli.checkpoints.exporting import name_of_schedule, square_side, word_for, write_checkpoint
from bidm_cli.checkpoints.families.openai.config import (
    OpenAISettings,
    is_network_alone,
    is_openai,
    read_settings,
    schedule_of,
)
from bidm_cli.checkpoints.families.openai.infer import NAMES, infer_unet
from bidm_cli.checkpoints.families.published import Assumed, KnownNetwork, assume, heads_text, known_network
from bidm_cli.checkpoints.reading.config import Config
from bidm_cli.checkpoints.reading.schedules import one_line
from bidm_cli.checkpoints.reading.state import Weights, shapes_of
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_OVERRIDE = "override with `config` or `settings`"


@base.register_family
class OpenAI(base.OneNetworkFamily[OpenAISettings]):
    """openai/improved-diffusion and openai/guided-diffusion."""

    signature = base.Signature("openai", "OpenAI improved-diffusion or guided-diffusion", (NAMES,))
    network_kind = "ldm_unet"

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        return "arguments" if "_class_name" not in values and is_openai(values) else None

    def accepts(self, config: Config) -> bool:
        return super().accepts(config) or is_network_alone(config)

    def settle(
        self, detected: base.Detected, find_config: Callable[[str], Config | None], latent: bool
    ) -> base.Detected:
        """LDM's U-Net alone has OpenAI's names: it is one if the configuration says so, if it attends to a
        context, if it comes with a first stage, or if its shapes are those of a published one of LDM's.
        """
        config = find_config(self.name) or find_config("ldm")
        context = "middle_block.1.transformer_blocks.0.attn2.to_k.weight" in detected.weights[0].tensors
        configured = config is not None and config.layout == "ldm" and not is_network_alone(config)
        known = None if config is not None else _published_by_ldm(detected.weights[0])
        if not (context or latent or configured or known):
            return detected
        reason = "it attends to a context" if context else "a first stage comes with it"
        if known and not (context or latent):
            reason = f"assumed: its shapes are those of LDM's {known.name}; override with `family` openai"
        if config is not None and config.layout == "ldm":
            reason = f"{config.path} says so"
        evidence = f"family ldm, the U-Net alone (names such as input_blocks.0.0.weight; {reason})"
        note = assumed(evidence) if "assumed" in reason else evidence
        return replace(detected, family="ldm", evidence=[note, *detected.evidence[1:]])

    def read_settings(self, config: Config) -> OpenAISettings:
        return read_settings(config)

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        settings = OpenAISettings() if config is None else read_settings(config)
        notes.extend(settings.notes)
        origin = base.INFERRED if config is None else f"from {config.path}"
        notes.append(f"architecture {origin}")
        choice = base.choose_weights(detected.weights, ema, notes, source=source)
        arguments, tensors = settings.unet, choice.weights.tensors
        if arguments is None:
            arguments = infer_unet(shapes_of(tensors))
            usual = assume(arguments)
            _note_heads(arguments, usual, notes)
            arguments |= usual.heads
            if usual.new_order:
                arguments["use_new_attention_order"] = True
        found = self.built(
            arguments, tensors, notes, origin, choice.spare, source=source, ema=choice.averaged
        )
        return self.assemble(settings, found)

    def assemble(self, settings: OpenAISettings, found: base.Found) -> Checkpoint:
        arguments, notes = found.arguments, found.notes
        usual = assume(arguments)
        channels, learned = _channels(arguments, notes)
        size = settings.image_size or usual.image_size
        if settings.image_size is None:
            notes.append(assumed(f"size {size}x{size} ({usual.reason}; {_OVERRIDE} image_size=N)"))
        schedule, rescale = _schedule(settings, usual, notes)
        time_scale = 1000 / schedule.timesteps if rescale else 1.0
        classes = arguments.get("num_classes")
        if classes is not None:
            notes.append(f"classes: {classes}, none of them for 'no class': no classifier-free guidance")
        checkpoint = self.checkpoint(
            found,
            sample_shape=(channels, size, size),
            schedule=schedule,
            convention=SamplingConvention(
                spacing="openai_ddim",
                clip="rederive" if settings.clips else "none",
                clip_ancestral=settings.clips,
                variance="learned_range" if learned else settings.fixed_variance,
                rounding="truncate",
            ),
            prediction=settings.prediction or "epsilon",
            num_classes=classes,
            time_scale=time_scale,
        )
        base.note_concatenation(checkpoint, notes)
        return checkpoint

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write a bare state dict, and JSON of the constructors' arguments."""
        timesteps = model.schedule.timesteps
        kinds = {kind: schedule_of(kind, timesteps) for kind in ("linear", "cosine")}
        diffusion = {
            "steps": timesteps,
            "noise_schedule": name_of_schedule(model, kinds),
            "predict_xstart": word_for(model.prediction, {"epsilon": False, "x0": True}, "prediction"),
            "sigma_small": model.convention.variance == "small",
            "learn_sigma": model.convention.variance == "learned_range",
            "rescale_timesteps": model.time_scale != 1.0,
        }
        arguments = model.architecture["unet"]["args"]
        unet = {key: value for key, value in arguments.items() if value is not None}
        size = square_side(model)
        config = {"library": "guided", "unet": unet, "diffusion": diffusion, "image_size": size}
        return write_checkpoint(path, dict(weights), config)


def _published_by_ldm(weights: Weights) -> KnownNetwork | None:
    """The network of LDM's that has these shapes, if there is one."""
    try:
        return known_network(infer_unet(shapes_of(weights.tensors)))
    except BidmError:
        return None


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
        "give its configuration with `config`"
    )


def _schedule(settings: OpenAISettings, usual: Assumed, notes: list[str]) -> tuple[NoiseSchedule, bool]:
    """(schedule, whether the network sees t * 1000 / T), as configured, else as ``usual``; noted."""
    says = settings.schedule is not None
    schedule = settings.schedule or schedule_of(usual.schedule, usual.timesteps)
    rescale = bool(settings.rescale) if says else usual.rescale
    reason = "from the configuration" if says else f"{usual.reason}; {_OVERRIDE} beta_schedule=..., timesteps"
    time = f"the network sees t * {1000 / schedule.timesteps:g}" if rescale else "not rescaled"
    other = str(not rescale).lower()
    lines = [
        f"schedule: {one_line(schedule)} ({reason})",
        f"time: {time} (override with `settings` rescale_timesteps={other})",
    ]
    if settings.prediction is None:
        lines.append(f"the network predicts the noise ({usual.reason}; {_OVERRIDE} prediction=x0)")
    notes.extend(lines if says else map(assumed, lines))
    return schedule, rescale


def _note_heads(arguments: dict[str, Any], usual: Assumed, notes: list[str]) -> None:
    order = "new" if usual.new_order else "legacy"
    line = f"attention heads: {heads_text(usual.heads)}, {order} order of q, k, v ({usual.reason}; "
    line += f"{_OVERRIDE} {next(iter(usual.heads))}=N, use_new_attention_order=true)"
    notes.append(assumed(line))
    latent = known_network(arguments)
    if latent is not None:
        notes.append(
            f"its shapes are also those of LDM's {latent.name}; if it is that, give LDM's config.yaml with "
            "`config`"
        )
