"""DiT: the released bare state dicts, the training script's {model, ema, opt, args}, and JSON of the
constructor's arguments or of the script's options.

Everything but the number of heads shows in the weights. The decoder of its latents (sd-vae-ft) is another
file, so sampling gives latents. Guidance acts on the first three channels alone, as in the original code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import Detected
from bidm_cli.checkpoints.families.openai.infer import Shapes
from bidm_cli.checkpoints.reading.config import Config, Section
from bidm_cli.checkpoints.reading.pickle_names import Stub
from bidm_cli.checkpoints.reading.state import Weights, load_strictly, on_meta, shapes_of
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_OVERRIDE = "override with --set num_heads=N"
_HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
_SIZES = {"XL": (1152, 28, 16), "L": (1024, 24, 16), "B": (768, 12, 12), "S": (384, 12, 6)}
_NAME = re.compile(r"DiT-(XL|L|B|S)/(2|4|8)")


@dataclass(frozen=True)
class DiTSettings:
    """What a configuration or the training options say; None where they do not."""

    heads: int | None = None
    num_classes: int | None = None
    origin: str = ""


def load(detected: Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
    """A :class:`Checkpoint` from a file found to be of this family.

    Raises:
        BidmError: weights and architecture do not fit, or settings are missing or make no sense.
    """
    notes = list(detected.evidence)
    options = _training_options(detected.contents)
    settings = DiTSettings()
    if config is not None:
        settings = _settings(config.root, str(config.path))
    elif options is not None:
        settings = _settings(options, "the training options in the file")
    if "num_heads" in detected.settings:
        settings = replace(
            settings, heads=Section(detected.settings, "--set").integer("num_heads"), origin="--set"
        )
    chosen, averaged = _choose(detected.weights, ema, notes)
    arguments = _inferred(shapes_of(chosen.tensors))
    arguments["num_heads"] = _heads(arguments["hidden_size"], settings, notes)
    if config is not None:
        _check_agreement(arguments, config.root)
    notes.append("architecture inferred from names and shapes")
    unet = load_strictly(
        {"kind": "dit", "args": arguments}, chosen.tensors, "transformer", origin="inferred from its names"
    )
    return _assemble(settings, arguments, unet, notes, source=source, ema=averaged)


def from_config(config: Config) -> Checkpoint:
    """The network of a bare configuration, on the meta device.

    Raises:
        BidmError: settings are missing or make no sense.
    """
    arguments = _arguments(config.root)
    settings = _settings(config.root, str(config.path))
    notes = [f"family dit: configuration {config.path}; no weights"]
    unet = on_meta({"kind": "dit", "args": arguments})
    return _assemble(settings, arguments, unet, notes, source=config.path, has_weights=False)


def _assemble(
    settings: DiTSettings,
    arguments: dict[str, Any],
    unet: torch.nn.Module,
    notes: list[str],
    **about: Any,
) -> Checkpoint:
    channels, rows, size = arguments["in_channels"], arguments["label_rows"], arguments["input_size"]
    learned = arguments["out_channels"] == 2 * channels
    # Trained without dropping labels, the table has no row for the null label.
    null = None if settings.num_classes == rows else rows - 1
    if null is None:
        notes.append(f"classes: {rows}, none of them for 'no class': no classifier-free guidance")
    else:
        notes.append(
            f"classes: {rows - 1}, and the null label {null} (the table's last row; override "
            "with --set null_label=null)"
        )
    notes.append("variance: " + ("learned" if learned else "fixed (large)"))
    notes.append(
        "schedule: linear, T=1000, 0.0001 to 0.02 (assumed, as all of DiT; "
        "override with --set beta_schedule=..., beta_start, beta_end, timesteps)"
    )
    if channels not in (1, 3):
        notes.append(
            f"first stage: none; this denoises latents of {channels} channels, whose decoder (sd-vae-ft, "
            "scale 0.18215) is another file: give it with --first-stage, or sample with --raw"
        )
    return Checkpoint(
        family="dit",
        unet=unet,
        architecture={"unet": {"kind": "dit", "args": arguments}, "first_stage": None, "conditioner": None},
        sample_shape=(channels, size, size),
        schedule=NoiseSchedule.linear(1000, 1e-4, 0.02),
        convention=SamplingConvention(
            spacing="openai_ddim",
            final_alpha="one",
            clip="none",
            clip_ancestral=False,
            variance="learned_range" if learned else "large",
            guided_channels=min(3, channels),
        ),
        null_label=null,
        num_classes=rows,
        evidence=notes,
        **about,
    )


def _choose(found: list[Weights], ema: bool, notes: list[str]) -> tuple[Weights, bool]:
    """(the state dict to load, whether it is the averaged one); the released bare files are averages."""
    averaged = next((weights for weights in found if weights.is_average), None)
    trained = next((weights for weights in found if not weights.is_average), None)
    if averaged is not None and (ema or trained is None):
        if not ema:
            raise BidmError("the file holds averaged (EMA) weights alone; load it with them")
        notes.append(f"weights: EMA ({averaged.where})")
        return averaged, True
    assert trained is not None
    if averaged is not None:
        notes.append(f"weights: as trained ({trained.where}); the averaged (EMA) ones were not asked for")
        return trained, False
    notes.append("weights: the only ones in the file; DiT's released files hold averages (EMA)")
    return trained, trained.where == ""


def _inferred(shapes: Shapes) -> dict[str, Any]:
    """Arguments from the weights but for the heads.

    Raises:
        BidmError: the weights are not a DiT's.
    """
    try:
        hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
        tokens, side = shapes["pos_embed"][1], math.isqrt(shapes["pos_embed"][1])
        if side * side != tokens:
            raise BidmError(f"{tokens} tokens make no square image; bidm reads DiT's square ones")
        outputs, rest = divmod(shapes["final_layer.linear.weight"][0], patch**2)
        if rest or outputs not in (channels, 2 * channels):
            raise BidmError(
                f"the last layer has {outputs} channels out for {channels} in; a DiT has as many, or twice"
            )
        return {
            "input_size": side * patch,
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": outputs,
            "hidden_size": hidden,
            "depth": len({m[1] for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}),
            "label_rows": shapes["y_embedder.embedding_table.weight"][0],
            "mlp_width": shapes["blocks.0.mlp.fc1.weight"][0],
            "frequencies": shapes["t_embedder.mlp.0.weight"][1],
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise BidmError(
            f"cannot tell the transformer's architecture from its weights: {error} is missing or has an odd "
            "shape; the file is incomplete or no DiT"
        ) from error


def _heads(hidden: int, settings: DiTSettings, notes: list[str]) -> int:
    """Heads as configured, as in the published network of that width, or 64 channels wide."""
    if settings.heads is not None:
        notes.append(f"attention heads: {settings.heads} (from {settings.origin})")
        return settings.heads
    if hidden in _HEADS:
        notes.append(
            f"attention heads: {_HEADS[hidden]} (as the published DiT of width {hidden}; {_OVERRIDE})"
        )
        return _HEADS[hidden]
    if hidden % 64:
        raise BidmError(
            f"the number of attention heads is not in the file and no published DiT has the width {hidden}; "
            "give it, as in --set num_heads=8"
        )
    notes.append(f"attention heads: {hidden // 64} (assumed: 64 channels each; {_OVERRIDE})")
    return hidden // 64


def _training_options(contents: Any) -> Section | None:
    """The training script's command line, pickled as argparse.Namespace beside the weights."""
    found = contents.get("args") if isinstance(contents, Mapping) else None
    state = found.state if isinstance(found, Stub) else found
    if not isinstance(state, Mapping):
        return None
    values = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, (str, int, float))}
    return Section(values, "the file's args")


def _settings(options: Section, origin: str) -> DiTSettings:
    """Heads and classes of constructor arguments, or of the script's options (``model`` "DiT-XL/2")."""
    model = _model_section(options)
    heads = model.integer("num_heads") if "num_heads" in model else None
    if heads is None and (named := _published(options)):
        heads = named[2]
    if heads is not None and not 1 <= heads <= 1024:
        raise model.wrong("num_heads", "1 to 1024", heads)
    classes = model.integer("num_classes") if "num_classes" in model else None
    return DiTSettings(heads, classes, origin)


def _model_section(options: Section) -> Section:
    return options.section("unet") if isinstance(options.values.get("unet"), Mapping) else options


def _published(options: Section) -> tuple[int, int, int, int] | None:
    """(width, depth, heads, patch) of a published network's name."""
    match = _NAME.fullmatch(str(options.values.get("model", "")))
    return None if match is None else (*_SIZES[match[1]], int(match[2]))


def _arguments(root: Section) -> dict[str, Any]:
    """Arguments from those of the constructor, its defaults included, or from the script's options."""
    model = _model_section(root)
    width, depth, heads, patch = _published(root) or (1152, 28, 16, 2)
    size = model.integer("input_size", root.integer("image_size", 256) // 8)
    channels = model.integer("in_channels", 4)
    hidden = model.integer("hidden_size", width)
    classes = model.integer("num_classes", root.integer("num_classes", 1000))
    return {
        "input_size": size,
        "patch_size": model.integer("patch_size", patch),
        "in_channels": channels,
        "out_channels": channels * (2 if model.flag("learn_sigma", True) else 1),
        "hidden_size": hidden,
        "depth": model.integer("depth", depth),
        "num_heads": model.integer("num_heads", heads),
        "label_rows": classes + (model.number("class_dropout_prob", 0.1) > 0),
        "mlp_width": int(hidden * model.number("mlp_ratio", 4.0)),
        "frequencies": 256,
    }


def _check_agreement(arguments: dict[str, Any], root: Section) -> None:
    """Refuse a configuration that belongs to another file."""
    model = _model_section(root)
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth"):
        if name in model and model.integer(name) != arguments[name]:
            raise BidmError(
                f"{model.where}: {name} is {model.integer(name)}, but the weights have {arguments[name]}; "
                "give the configuration that belongs to the file"
            )
