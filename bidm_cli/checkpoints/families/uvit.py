"""U-ViT: bare state dicts (nnet.pth, nnet_ema.pth, the released files) and JSON of constructor arguments.

Everything but the heads shows in the weights. Its code has no DDIM: pixel models are trained in continuous
time (VP-SDE, betas 0.1 to 20), here cut into 1000 steps; latent ones on Stable Diffusion's 1000. The decoder
of the latents is another file. Guidance s in its code, e_c + s (e_c - e_u), is --guidance 1 + s here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import Detected
from bidm_cli.checkpoints.families.openai.infer import Shapes
from bidm_cli.checkpoints.reading.config import Config, Section
from bidm_cli.checkpoints.reading.schedules import one_line
from bidm_cli.checkpoints.reading.state import Weights, load_strictly, on_meta, shapes_of
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import TOKENS
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_OVERRIDE = "override with --set num_heads=N"
_HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}
_STEPS = 1000
_EMA = re.compile(r"(?<![a-z])ema(?![a-z])")


def load(detected: Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
    """A :class:`Checkpoint` from a file found to be of this family.

    Raises:
        BidmError: weights and architecture do not fit, or settings are missing or make no sense.
    """
    notes = list(detected.evidence)
    weights, averaged = _choose(detected.weights, ema, source, notes)
    options = Section({}, "") if config is None else _options(config)
    if "num_heads" in detected.settings:
        options = Section({**options.values, "num_heads": detected.settings["num_heads"]}, "--set")
    tokens = _context_tokens(detected.settings, options)
    arguments = _inferred(shapes_of(weights.tensors), tokens, notes)
    arguments["num_heads"] = _heads(arguments["embed_dim"], options, notes)
    for name in ("img_size", "patch_size", "in_chans", "embed_dim"):
        if name in options and options.integer(name) != arguments[name]:
            raise BidmError(
                f"{options.where}: {name} is {options.integer(name)}, the weights have {arguments[name]}; "
                "give the configuration that belongs to the file"
            )
    notes.append("architecture inferred from names and shapes")
    unet = load_strictly(
        {"kind": "uvit", "args": arguments}, weights.tensors, "transformer", origin="inferred from its names"
    )
    return _assemble(arguments, options, unet, notes, source=source, ema=averaged)


def from_config(config: Config) -> Checkpoint:
    """The network of a bare configuration, on the meta device.

    Raises:
        BidmError: settings are missing or make no sense.
    """
    options = _options(config)
    arguments = _arguments(options)
    notes = [f"family uvit: configuration {config.path}; no weights"]
    unet = on_meta({"kind": "uvit", "args": arguments})
    return _assemble(arguments, options, unet, notes, source=config.path, has_weights=False)


def _options(config: Config) -> Section:
    """The constructor's arguments: flat, or under "unet" or "nnet"."""
    root = config.root
    return next((root.section(name) for name in ("unet", "nnet") if name in root), root)


def _assemble(
    arguments: dict[str, Any], options: Section, unet: torch.nn.Module, notes: list[str], **about: Any
) -> Checkpoint:
    channels, rows = arguments["in_chans"], arguments["label_rows"]
    pixels = channels in (1, 3)
    schedule = _vp_sde() if pixels else NoiseSchedule.scaled_linear(_STEPS, 0.00085, 0.012)
    kind = "VP-SDE 0.1 to 20 cut into 1000 steps" if pixels else one_line(schedule)
    what = "pixel" if pixels else "latent"
    notes.append(
        f"schedule: {kind} (assumed, as all {what} models of U-ViT; "
        "override with --set beta_schedule=..., beta_start, beta_end, timesteps)"
    )
    null = None
    if rows is not None:
        # The published latent models are trained for guidance, the pixel models are not.
        null = rows - 1 if options.flag("null_label", not pixels) else None
        notes.append(
            f"classes: {rows}"
            + ("" if null is None else ", the last for 'no class' (override with --set null_label=null)")
        )
    if not pixels:
        notes.append(
            f"first stage: none; this denoises latents of {channels} channels, whose decoder (scale "
            "0.18215) is another file: give it with --first-stage, or sample with --raw"
        )
    if arguments.get("context_dim") is not None:
        notes.append(
            f"attends to a context of {arguments['context_tokens']} tokens of width "
            f"{arguments['context_dim']}, to be given (--context)"
        )
    return Checkpoint(
        family="uvit",
        unet=unet,
        architecture={"unet": {"kind": "uvit", "args": arguments}, "first_stage": None, "conditioner": None},
        sample_shape=(channels, arguments["img_size"], arguments["img_size"]),
        schedule=schedule,
        convention=SamplingConvention(spacing="lucidrains", final_alpha="one", clip="none", variance="small"),
        null_label=null,
        num_classes=rows,
        evidence=notes,
        **about,
    )


def _vp_sde() -> NoiseSchedule:
    """alpha-bar(u) = exp(-u^2 (20 - 0.1) / 2 - 0.1 u) at u = 1/1000 ... 1 (arXiv 2011.13456, eq. 33)."""
    u = torch.arange(1, _STEPS + 1, dtype=torch.float64) / _STEPS
    return NoiseSchedule.explicit(torch.exp(-0.5 * (20 - 0.1) * u**2 - 0.1 * u))


def _choose(found: list[Weights], ema: bool, source: Path, notes: list[str]) -> tuple[Weights, bool]:
    """(the state dict to load, whether it is the averaged one); U-ViT keeps each in a file of its own."""
    averaged = [weights for weights in found if weights.is_average]
    trained = [weights for weights in found if weights not in averaged]
    if not trained and not ema:
        raise BidmError("the file holds averaged (EMA) weights alone; load it with them")
    if averaged and (ema or not trained):
        notes.append(f"weights: EMA ({averaged[0].where})")
        return averaged[0], True
    by_name = bool(_EMA.search(source.name.lower()))
    notes.append("weights: EMA (by the file's name)" if by_name else "weights: the only ones in the file")
    return trained[0], by_name


def _context_tokens(settings: Mapping[str, Any], options: Section) -> int | None:
    """How many tokens a context has, as ``--set`` or the configuration says."""
    if "context_tokens" in settings:
        return Section(settings, "--set").integer("context_tokens")
    return options.integer("num_clip_token") if "num_clip_token" in options else None


def _context(shapes: Shapes, tokens: int | None, notes: list[str]) -> dict[str, int]:
    """Arguments for the context of a text-conditional network; none for others."""
    if "context_embed.weight" not in shapes:
        return {}
    if tokens is None:
        tokens = TOKENS
        notes.append(
            f"contexts of {TOKENS} tokens (assumed, as the published one; override with "
            "--set context_tokens=N)"
        )
    return {"context_dim": shapes["context_embed.weight"][1], "context_tokens": tokens}


def _inferred(shapes: Shapes, tokens: int | None, notes: list[str]) -> dict[str, Any]:
    """Arguments from the weights but for the heads and ``tokens``, the context's length.

    Raises:
        BidmError: the weights are not a U-ViT's that bidm has.
    """
    try:
        context = _context(shapes, tokens, notes)
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        rows = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None
        patches = shapes["pos_embed"][1] - (1 if rows is None else 2) - context.get("context_tokens", 0)
        side = math.isqrt(max(patches, 0))
        if side * side != patches:
            hint = "; the context has other tokens (--set context_tokens=N)" if context else ""
            raise BidmError(f"{patches} patches make no square image; bidm reads U-ViT's square ones{hint}")
        return context | {
            "img_size": side * patch,
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": width,
            "half_depth": len({m[1] for name in shapes if (m := re.match(r"in_blocks\.(\d+)\.", name))}),
            "mlp_width": shapes["mid_block.mlp.fc1.weight"][0],
            "qkv_bias": "mid_block.attn.qkv.bias" in shapes,
            "mlp_time_embed": "time_embed.0.weight" in shapes,
            "label_rows": rows,
            "conv": "final_layer.weight" in shapes,
            "skip": "out_blocks.0.skip_linear.weight" in shapes,
            "time_scale": _time_scale(channels),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise BidmError(
            f"cannot tell the transformer's architecture from its weights: {error} is missing or has an odd "
            "shape; the file is incomplete or no U-ViT"
        ) from error


def _time_scale(channels: int) -> float:
    """Pixel models see 999 times a time that runs from 0 to 1, latent ones the number of the step."""
    return 999 / _STEPS if channels in (1, 3) else 1.0


def _heads(width: int, options: Section, notes: list[str]) -> int:
    """Heads as configured, as in the published network of that width, or 64 channels wide."""
    if "num_heads" in options:
        heads = options.integer("num_heads")
        if not 1 <= heads <= 1024:
            raise options.wrong("num_heads", "1 to 1024", heads)
        notes.append(f"attention heads: {heads} (from the configuration)")
        return heads
    if width in _HEADS:
        notes.append(
            f"attention heads: {_HEADS[width]} (as the published U-ViT of width {width}; {_OVERRIDE})"
        )
        return _HEADS[width]
    if width % 64:
        raise BidmError(
            f"the number of attention heads is not in the file and no published U-ViT has the width {width}; "
            "give it, as in --set num_heads=8"
        )
    notes.append(f"attention heads: {width // 64} (assumed: 64 channels each; {_OVERRIDE})")
    return width // 64


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
