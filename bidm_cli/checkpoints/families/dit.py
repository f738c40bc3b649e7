"""DiT: the released bare state dicts, the training script's {model, ema, opt, args}, and JSON of the
constructor's arguments or of the script's options.

Everything but the number of heads shows in the weights. The decoder of its latents (sd-vae-ft) is another
file, so sampling gives latents. Guidance acts on the first three channels alone, as in the original code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed
from bidm_cli.checkpoints.exporting import name_of_schedule, word_for, write_checkpoint
from bidm_cli.checkpoints.families.openai.config import schedule_of
from bidm_cli.checkpoints.families.patch_transformers import PatchTransformer, TransformerSettings
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.pickle_names import Stub
from bidm_cli.checkpoints.reading.schedules import check_schedule, one_line
from bidm_cli.checkpoints.reading.shapes import Shapes, count, inferring
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_SIZES = {"XL": (1152, 28, 16), "L": (1024, 24, 16), "B": (768, 12, 12), "S": (384, 12, 6)}
_IMAGENET_ROWS = 1001
_NAME = re.compile(r"DiT-(XL|L|B|S)/(2|4|8)")


@base.register_family
class DiT(PatchTransformer):
    """facebookresearch/DiT."""

    signature = base.Signature(
        "dit", "DiT", (("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"),)
    )
    network_kind, title, width = "dit", "DiT", "hidden_size"
    heads: ClassVar = {1152: 16, 1024: 16, 768: 12, 384: 6}
    agreeing = ("input_size", "patch_size", "in_channels", "hidden_size", "depth")
    decoder = "sd-vae-ft, scale 0.18215"
    released = "as DiT's released files"

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        named = str(values.get("model")).startswith(("DiT-", "SiT-"))
        return "arguments" if named or "hidden_size" in base.network_section(values) else None

    def file_settings(self, detected: base.Detected, config: Config | None) -> TransformerSettings:
        if config is not None:
            options = config.root.inside("unet")
            return replace(_settings(config.root, str(config.path)), options=options)
        trained = _training_options(detected.contents)
        origin = "the training options in the file"
        return TransformerSettings() if trained is None else _settings(trained, origin)

    @inferring("transformer", "or no DiT")
    def inferred(self, shapes: Shapes, settings: TransformerSettings, notes: list[str]) -> dict[str, Any]:
        hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
        tokens = shapes["pos_embed"][1]
        side = math.isqrt(tokens)
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
            "depth": count(shapes, r"blocks\.(\d+)\..*"),
            "label_rows": shapes["y_embedder.embedding_table.weight"][0],
            "mlp_width": shapes["blocks.0.mlp.fc1.weight"][0],
            "frequencies": shapes["t_embedder.mlp.0.weight"][1],
        }

    def read_settings(self, config: Config) -> TransformerSettings:
        return replace(_settings(config.root, str(config.path)), unet=_arguments(config.root))

    def assemble(self, settings: TransformerSettings, found: base.Found) -> Checkpoint:
        arguments, notes = found.arguments, found.notes
        channels, rows, size = arguments["in_channels"], arguments["label_rows"], arguments["input_size"]
        learned = arguments["out_channels"] == 2 * channels
        null = _null_label(rows, settings, notes)
        notes.append("variance: " + ("learned" if learned else "fixed (large)"))
        schedule = settings.schedule
        if schedule is None:
            schedule = base.assumed_linear("as all of DiT", notes)
        else:
            notes.append(f"schedule: {one_line(schedule)} (from {settings.origin})")
        latent = settings.latent or channels not in (1, 3)
        if latent:
            self.note_decoder(channels, notes)
        return self.checkpoint(
            found,
            sample_shape=(channels, size, size),
            schedule=schedule,
            prediction=settings.prediction,
            convention=SamplingConvention(
                spacing="openai_ddim",
                variance="learned_range" if learned else "large",
                guided_channels=min(3, channels),
            ),
            null_label=null,
            num_classes=rows,
            latent=latent,
        )

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write a bare state dict, as the released files, and JSON of the constructor's arguments."""
        name_of_schedule(model, {"linear": NoiseSchedule.linear(1000, 1e-4, 0.02)})
        predicts_x0 = word_for(model.prediction, {"epsilon": False, "x0": True}, "prediction")
        arguments = model.architecture["unet"]["args"]
        has_null = model.null_label is not None
        return write_checkpoint(path, dict(weights), {
            **{name: arguments[name] for name in (*self.agreeing, "num_heads")},
            "mlp_ratio": arguments["mlp_width"] / arguments["hidden_size"],
            "class_dropout_prob": 0.1 if has_null else 0.0,
            "num_classes": arguments["label_rows"] - has_null,
            "learn_sigma": arguments["out_channels"] == 2 * arguments["in_channels"],
            **({"predict_xstart": True} if predicts_x0 else {}),
        })  # fmt: skip


def _null_label(rows: int, settings: TransformerSettings, notes: list[str]) -> int | None:
    """The null label: the last row of the table of labels, but if the network was trained without one.

    The table has a row more than there are classes then, which the number of classes tells.
    """
    if rows == settings.num_classes or settings.null_label is False:
        notes.append(
            f"classes: {rows}, none of them for 'no class': no classifier-free guidance (from "
            f"{settings.origin}; override with `settings` null_label=N)"
        )
        return None
    reason = f"from {settings.origin}" if settings.num_classes == rows - 1 else "as ImageNet's 1000"
    known = settings.num_classes == rows - 1 or (settings.num_classes is None and rows == _IMAGENET_ROWS)
    if not known:
        reason = "assumed: the table's last row, as all published ones"
    line = f"classes: {rows - 1}, and the null label {rows - 1} ({reason}; override with `settings` "
    notes.append(line + "null_label=none)" if known else assumed(line + "null_label=none)"))
    return rows - 1


def _training_options(contents: Any) -> Section | None:
    """The training script's command line, pickled as argparse.Namespace beside the weights."""
    found = contents.get("args") if isinstance(contents, Mapping) else None
    state = found.state if isinstance(found, Stub) else found
    if not isinstance(state, Mapping):
        return None
    values = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, (str, int, float))}
    return Section(values, "the file's args")


def _settings(options: Section, origin: str) -> TransformerSettings:
    """Heads and classes of constructor arguments, or of the script's options (``model`` "DiT-XL/2")."""
    model = options.inside("unet")
    heads = PatchTransformer.configured_heads(model)
    if heads is None and (named := _published(options)):
        heads = named[2]
    classes = first(Section.integer, (model, "num_classes"))
    dropout = first(Section.number, (model, "class_dropout_prob"))
    diffusion = options.inside("diffusion")
    kind, timesteps = diffusion.text("noise_schedule", "linear"), diffusion.integer("diffusion_steps", 1000)
    check_schedule(diffusion.where, 1e-4, 0.02, timesteps)
    says = "noise_schedule" in diffusion or "diffusion_steps" in diffusion
    return TransformerSettings(
        heads=heads,
        origin=origin,
        num_classes=classes,
        null_label=None if dropout is None else dropout > 0,
        latent="vae" in options,
        prediction="x0" if diffusion.flag("predict_xstart") else "epsilon",
        schedule=schedule_of(kind, timesteps, diffusion) if says else None,
    )


def _published(options: Section) -> tuple[int, int, int, int] | None:
    """(width, depth, heads, patch) of a published network's name."""
    match = _NAME.fullmatch(str(options.values.get("model", "")))
    return None if match is None else (*_SIZES[match[1]], int(match[2]))


def _arguments(root: Section) -> dict[str, Any]:
    """Arguments from those of the constructor, its defaults included, or from the script's options."""
    model = root.inside("unet")
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
