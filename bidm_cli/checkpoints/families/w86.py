"""w86763777/pytorch-ddpm: ``ckpt.pt`` with ``net_model`` and ``ema_model``, bare state dicts, and JSON of
constructor arguments alone.

Names and shapes give the whole architecture. The original samples all T steps and clips the final image only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import Detected
from bidm_cli.checkpoints.families.openai.infer import Shapes
from bidm_cli.checkpoints.reading.config import Config
from bidm_cli.checkpoints.reading.schedules import one_line
from bidm_cli.checkpoints.reading.state import Weights, load_strictly, on_meta, shapes_of
from bidm_cli.checkpoints.reading.unpickle import read_file
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_BETAS = (1e-4, 0.02)


@dataclass(frozen=True)
class W86Settings:
    """What a configuration says; None where it does not, or where there is none."""

    unet: dict[str, Any] | None = None
    image_size: int | None = None
    betas: tuple[float, float] | None = None
    variance: Literal["small", "large"] = "large"
    prediction: Literal["epsilon", "x0"] = "epsilon"


def load(detected: Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
    """A :class:`Checkpoint` from a file found to be of this family.

    Raises:
        BidmError: weights and architecture do not fit, or settings make no sense.
    """
    notes = list(detected.evidence)
    settings = W86Settings() if config is None else read_settings(config)
    chosen, averaged = _choose(detected.weights, ema, notes)
    arguments = infer_w86_unet(shapes_of(chosen.tensors))
    notes.append("architecture inferred from names and shapes, which tell all of it")
    origin = "inferred from names and shapes"
    unet = load_strictly({"kind": "w86_unet", "args": arguments}, chosen.tensors, "U-Net", origin=origin)
    unet.get_submodule("time_embedding.timembedding.0").requires_grad_(False)
    size = settings.image_size or _size_in_file(source, notes)
    return _assemble(settings, arguments, unet, size, notes, source=source, ema=averaged)


def from_config(config: Config) -> Checkpoint:
    """The network of a bare configuration, on the meta device.

    Raises:
        BidmError: settings are missing or make no sense.
    """
    settings = read_settings(config)
    assert settings.unet is not None
    notes = [f"family w86763777: configuration {config.path}; no weights"]
    unet = on_meta({"kind": "w86_unet", "args": settings.unet})
    size = settings.image_size or _assumed_size(notes)
    return _assemble(settings, settings.unet, unet, size, notes, source=config.path, has_weights=False)


def _assemble(
    settings: W86Settings,
    arguments: dict[str, Any],
    unet: torch.nn.Module,
    size: tuple[int, int] | int,
    notes: list[str],
    **about: Any,
) -> Checkpoint:
    height, width = (size, size) if isinstance(size, int) else size
    schedule = NoiseSchedule.linear(arguments["timesteps"], *(settings.betas or _BETAS))
    reason = (
        "from the configuration"
        if settings.betas
        else "assumed: the original's default betas; override with --set beta_start=..., beta_end"
    )
    notes.append(f"schedule: {one_line(schedule)} (T from the weights, {reason})")
    return Checkpoint(
        family="w86763777",
        unet=unet,
        architecture={
            "unet": {"kind": "w86_unet", "args": arguments},
            "first_stage": None,
            "conditioner": None,
        },
        sample_shape=(arguments["out_channels"], height, width),
        schedule=schedule,
        convention=SamplingConvention(
            spacing="ddim", final_alpha="one", clip="none", clip_ancestral=False, variance=settings.variance
        ),
        prediction=settings.prediction,
        evidence=notes,
        **about,
    )


def _choose(found: list[Weights], ema: bool, notes: list[str]) -> tuple[Weights, bool]:
    averaged = [weights for weights in found if weights.is_average]
    trained = [weights for weights in found if weights not in averaged]
    if not trained and not ema:
        raise BidmError("the file holds averaged (EMA) weights alone; load it with them")
    if averaged and (ema or not trained):
        notes.append(f"weights: EMA ({averaged[0].where})")
        return averaged[0], True
    kept = "the averaged (EMA) ones were not asked for" if averaged else "the file has no averaged ones"
    notes.append(f"weights: as trained; {kept}")
    return trained[0], False


def _size_in_file(source: Path, notes: list[str]) -> tuple[int, int] | int:
    """Image size from ``x_T``, the noise that the original keeps in its file to draw the same samples."""
    contents = read_file(source)
    noise = contents.get("x_T") if isinstance(contents, Mapping) else None
    if isinstance(noise, torch.Tensor) and noise.dim() == 4 and 1 <= min(noise.shape[2:]) <= 1 << 14:
        notes.append(f"size {noise.shape[2]}x{noise.shape[3]} (from the file's x_T)")
        return int(noise.shape[2]), int(noise.shape[3])
    return _assumed_size(notes)


def _assumed_size(notes: list[str]) -> int:
    notes.append("size 32x32 (assumed: the original's default; override with --set image_size=N)")
    return 32


def infer_w86_unet(shapes: Shapes) -> dict[str, Any]:
    """Arguments of :class:`bidm_cli.networks.w86_unet.W86UNet` from its weights.

    Raises:
        BidmError: the weights are not such a network's.
    """
    try:
        timesteps, ch = shapes["time_embedding.timembedding.0.weight"]
        levels = _levels(shapes)
        convs = [shapes[f"downblocks.{level[0]}.block1.2.weight"] for level in levels]
        attention = [
            i for i, level in enumerate(levels) if f"downblocks.{level[0]}.attn.proj_q.weight" in shapes
        ]
        return {
            "timesteps": timesteps,
            "in_channels": shapes["head.weight"][1],
            "out_channels": shapes["tail.2.weight"][0],
            "ch": ch,
            "ch_mult": [conv[0] // ch for conv in convs],
            "num_res_blocks": len(levels[0]),
            "attention_levels": attention,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise BidmError(
            f"cannot tell the U-Net's architecture from its weights: {error} is missing or has an odd shape; "
            "the file is incomplete"
        ) from error


def _levels(shapes: Shapes) -> list[list[int]]:
    """Indices into ``downblocks`` of each resolution's residual blocks; a downsampler (``main``) ends one."""
    found = {int(m[1]) for name in shapes if (m := re.match(r"downblocks\.(\d{1,4})\.", name))}
    levels: list[list[int]] = [[]]
    for index in sorted(found):
        if f"downblocks.{index}.main.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(index)
    return levels


def read_settings(config: Config) -> W86Settings:
    """The settings of a configuration of the layout "w86763777": the original's flags or arguments as JSON.

    Raises:
        BidmError: a setting is missing, of the wrong type, or of something bidm does not have.
    """
    root = config.root
    unet = root.section("unet") if "unet" in root else root
    diffusion = root.section("diffusion") if "diffusion" in root else root
    timesteps = (unet if "T" in unet else diffusion).integer("T", 1000)
    betas = (diffusion.number("beta_1", _BETAS[0]), diffusion.number("beta_T", _BETAS[1]))
    if not 2 <= timesteps <= 100_000 or not 0 < betas[0] <= betas[1] < 1:
        raise BidmError(
            f"{root.where}: no noise schedule runs from {betas[0]} to {betas[1]} in {timesteps} steps"
        )
    size = next((s.integer(n) for s in (root, diffusion) for n in ("img_size", "image_size") if n in s), None)
    if size is not None and not 1 <= size <= 1 << 14:
        raise BidmError(f"{root.where}: no usable image size; it says {size}")
    variance = diffusion.text("var_type", "fixedlarge")
    mean = diffusion.text("mean_type", "epsilon")
    if variance not in ("fixedlarge", "fixedsmall"):
        raise diffusion.wrong("var_type", "fixedlarge or fixedsmall", variance)
    if mean not in ("epsilon", "xstart"):
        raise diffusion.wrong("mean_type", "epsilon or xstart", mean)
    return W86Settings(
        unet={
            "timesteps": timesteps,
            "in_channels": 3,
            "out_channels": 3,
            "ch": unet.integer("ch", 128),
            "ch_mult": unet.numbers("ch_mult", [1, 2, 2, 2]),
            "num_res_blocks": unet.integer("num_res_blocks", 2),
            "attention_levels": unet.numbers("attn", [1]),
            "dropout": unet.number("dropout", 0.1),
        },
        image_size=size,
        betas=betas,
        variance="small" if variance == "fixedsmall" else "large",
        prediction="epsilon" if mean == "epsilon" else "x0",
    )
