"""U-ViT: bare state dicts (nnet.pth, nnet_ema.pth, the released files) and JSON of constructor arguments.

Everything but the heads shows in the weights. Its code has no DDIM: pixel models are trained in continuous
time (VP-SDE, betas 0.1 to 20), here cut into 1000 steps; latent ones on Stable Diffusion's 1000. The decoder
of the latents is another file. Guidance s in its code, e_c + s (e_c - e_u), is `guidance` 1 + s here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed
from bidm_cli.checkpoints.exporting import word_for, write_checkpoint
from bidm_cli.checkpoints.families.patch_transformers import PatchTransformer, TransformerSettings
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.schedules import one_line
from bidm_cli.checkpoints.reading.shapes import Shapes, count, inferring
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import TOKENS, DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_STEPS = 1000
_PREDICTIONS: dict[str, Literal["epsilon", "x0"]] = {"noise_pred": "epsilon", "x0_pred": "x0"}
_IMAGENET_ROWS = 1001


@base.register_family
class UViT(PatchTransformer):
    """baofff/U-ViT."""

    signature = base.Signature(
        "uvit", "U-ViT", (("patch_embed.proj.weight", "mid_block.norm1.weight", "decoder_pred.weight"),)
    )
    network_kind, title, width = "uvit", "U-ViT", "embed_dim"
    heads: ClassVar = {512: 8, 768: 12, 1024: 16, 1152: 16}
    agreeing = ("img_size", "patch_size", "in_chans", "embed_dim")
    decoder = "scale 0.18215"

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        return "arguments" if "img_size" in base.network_section(values) else None

    def file_settings(self, detected: base.Detected, config: Config | None) -> TransformerSettings:
        settings = TransformerSettings() if config is None else _settings(config.root)
        tokens = first(Section.integer, (Section(detected.settings, "`settings`"), "context_tokens"))
        return settings if tokens is None else replace(settings, context_tokens=tokens)

    @inferring("transformer", "or no U-ViT")
    def inferred(self, shapes: Shapes, settings: TransformerSettings, notes: list[str]) -> dict[str, Any]:
        context = _context(shapes, settings.context_tokens, notes)
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        rows = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None
        patches = shapes["pos_embed"][1] - (1 if rows is None else 2) - context.get("context_tokens", 0)
        side = math.isqrt(max(patches, 0))
        if side * side != patches:
            hint = "; the context has other tokens (`settings` context_tokens=N)" if context else ""
            raise BidmError(f"{patches} patches make no square image; bidm reads U-ViT's square ones{hint}")
        return context | {
            "img_size": side * patch,
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": width,
            "half_depth": count(shapes, r"in_blocks\.(\d+)\..*"),
            "mlp_width": shapes["mid_block.mlp.fc1.weight"][0],
            "qkv_bias": "mid_block.attn.qkv.bias" in shapes,
            "mlp_time_embed": "time_embed.0.weight" in shapes,
            "label_rows": rows,
            "conv": "final_layer.weight" in shapes,
            "skip": "out_blocks.0.skip_linear.weight" in shapes,
            "time_scale": _time_scale(channels),
        }

    def read_settings(self, config: Config) -> TransformerSettings:
        return replace(_settings(config.root), unet=_arguments(_options(config.root)))

    def assemble(self, settings: TransformerSettings, found: base.Found) -> Checkpoint:
        arguments, notes = found.arguments, found.notes
        channels, rows = arguments["in_chans"], arguments["label_rows"]
        pixels = channels in (1, 3)
        schedule = _vp_sde() if pixels else NoiseSchedule.scaled_linear(_STEPS, 0.00085, 0.012)
        kind = "VP-SDE 0.1 to 20 cut into 1000 steps" if pixels else one_line(schedule)
        what = "pixel" if pixels else "latent"
        reason = f"assumed, as all {what} models of U-ViT; {base.SET_SCHEDULE}"
        notes.append(assumed(f"schedule: {kind} ({reason})"))
        null = None if rows is None else _null_label(rows, pixels, settings, notes)
        if not pixels:
            self.note_decoder(channels, notes)
        if arguments.get("context_dim") is not None:
            notes.append(
                f"attends to a context of {arguments['context_tokens']} tokens of width "
                f"{arguments['context_dim']}, to be given (`context`)"
            )
        return self.checkpoint(
            found,
            sample_shape=(channels, arguments["img_size"], arguments["img_size"]),
            schedule=schedule,
            convention=SamplingConvention(spacing="lucidrains"),
            prediction=settings.prediction,
            null_label=null,
            num_classes=rows,
        )

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write a bare state dict (``nnet_ema.pth``), and JSON of the constructor's arguments."""
        predicted = word_for(model.prediction, {o: t for t, o in _PREDICTIONS.items()}, "prediction")
        arguments = model.architecture["unet"]["args"]
        rows = arguments.get("label_rows")
        same = (*self.agreeing, "num_heads", "qkv_bias", "mlp_time_embed")
        context = {}
        if arguments.get("context_dim") is not None:
            context = {"clip_dim": arguments["context_dim"], "num_clip_token": arguments["context_tokens"]}
        return write_checkpoint(path, dict(weights), context | {
            **{name: arguments[name] for name in same if name in arguments},
            "depth": 2 * arguments["half_depth"] + 1,
            "mlp_ratio": arguments["mlp_width"] / arguments["embed_dim"],
            "num_classes": -1 if rows is None else rows,
            "null_label": model.null_label is not None,
            "conv": arguments.get("conv", True),
            "skip": arguments.get("skip", True),
            **({} if model.prediction == "epsilon" else {"pred": predicted}),
        })  # fmt: skip


def _null_label(rows: int, pixels: bool, settings: TransformerSettings, notes: list[str]) -> int | None:
    """The null label: the last one of the published latent models, which are trained for guidance.

    Pixel models have none.
    """
    guided = not pixels if settings.null_label is None else settings.null_label
    if not guided:
        notes.append(
            f"classes: {rows}, none of them for 'no class': no classifier-free guidance (override with "
            "`settings` null_label=N)"
        )
        return None
    known = settings.null_label is not None or rows == _IMAGENET_ROWS
    reason = "" if known else "assumed, as all published latent models; "
    line = f"classes: {rows}, the last for 'no class' ({reason}override with `settings` null_label=none)"
    notes.append(line if known else assumed(line))
    return rows - 1


def _options(root: Section) -> Section:
    """The constructor's arguments: flat, or under "unet" or "nnet"."""
    return Section(base.network_section(root.values), root.where)


def _settings(root: Section) -> TransformerSettings:
    """Settings of the constructor's arguments, and of the training's configuration around them (``pred``)."""
    options = _options(root)
    return TransformerSettings(
        options=options,
        heads=PatchTransformer.configured_heads(options),
        context_tokens=first(Section.integer, (options, "num_clip_token")),
        null_label=first(Section.flag, (options, "null_label")),
        prediction=root.choice("pred", _PREDICTIONS, "noise_pred"),
    )


def _vp_sde() -> NoiseSchedule:
    """alpha-bar(u) = exp(-u^2 (20 - 0.1) / 2 - 0.1 u) at u = 1/1000 ... 1 (arXiv 2011.13456, eq. 33)."""
    u = torch.arange(1, _STEPS + 1, dtype=torch.float64) / _STEPS
    return NoiseSchedule.explicit(torch.exp(-0.5 * (20 - 0.1) * u**2 - 0.1 * u))


def _context(shapes: Shapes, tokens: int | None, notes: list[str]) -> dict[str, int]:
    """Arguments for the context of a text-conditional network; none for others."""
    if "context_embed.weight" not in shapes:
        return {}
    if tokens is None:
        tokens = TOKENS
        reason = "assumed, as the published one; override with `settings` context_tokens=N"
        notes.append(assumed(f"contexts of {TOKENS} tokens ({reason})"))
    return {"context_dim": shapes["context_embed.weight"][1], "context_tokens": tokens}


def _time_scale(channels: int) -> float:
    """Pixel models see 999 times a time that runs from 0 to 1, latent ones the number of the step."""
    return 999 / _STEPS if channels in (1, 3) else 1.0


def _arguments(options: Section) -> dict[str, Any]:
    """Arguments from those of the original constructor, its defaults included."""
    width, channels = options.integer("embed_dim", 768), options.integer("in_chans", 3)
    classes = options.integer("num_classes", -1)
    context: dict[str, Any] = {}
    if "clip_dim" in options or options.get("name", "") == "uvit_t2i":
        context["context_dim"] = options.integer("clip_dim", 768)
        context["context_tokens"] = options.integer("num_clip_token", TOKENS)
    return context | {
        "img_size": options.integer("img_size", 224),
        "patch_size": options.integer("patch_size", 16),
        "in_chans": channels,
        "embed_dim": width,
        "half_depth": options.integer("depth", 12) // 2,
        "mlp_width": int(width * options.number("mlp_ratio", 4.0)),
        "qkv_bias": options.flag("qkv_bias"),
        "mlp_time_embed": options.flag("mlp_time_embed"),
        "label_rows": classes if classes > 0 else None,
        "conv": options.flag("conv", True),
        "skip": options.flag("skip", True),
        "time_scale": _time_scale(channels),
        "num_heads": options.integer("num_heads", 12),
    }
