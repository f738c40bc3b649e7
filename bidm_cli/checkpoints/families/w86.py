"""w86763777/pytorch-ddpm: ``ckpt.pt`` with ``net_model`` and ``ema_model``, bare state dicts, and JSON of
constructor arguments alone.

Names and shapes give the whole architecture. The original samples all T steps and clips the final image only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed
from bidm_cli.checkpoints.exporting import schedule_ends, square_side, word_for, write_checkpoint
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.schedules import check_schedule, one_line
from bidm_cli.checkpoints.reading.shapes import Shapes, inferring
from bidm_cli.checkpoints.reading.state import shapes_of
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule

_BETAS = (1e-4, 0.02)
_VARIANCES: dict[str, Literal["small", "large"]] = {"fixedlarge": "large", "fixedsmall": "small"}
_PREDICTIONS: dict[str, Literal["epsilon", "x0"]] = {"epsilon": "epsilon", "xstart": "x0"}


@dataclass(frozen=True)
class W86Settings(base.NetworkSettings):
    """Settings of a configuration; None where it does not say."""

    image_size: tuple[int, int] | None = None
    betas: tuple[float, float] | None = None
    variance: Literal["small", "large"] = "large"
    prediction: Literal["epsilon", "x0"] = "epsilon"


@base.register_family
class W86(base.OneNetworkFamily[W86Settings]):
    """w86763777/pytorch-ddpm."""

    signature = base.Signature(
        "w86763777", "w86763777/pytorch-ddpm", (("time_embedding.timembedding.0.weight", "head.weight"),)
    )
    network_kind = "w86_unet"

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        return "arguments" if {"attn", "ch_mult"} <= base.network_section(values).keys() else None

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        settings = W86Settings() if config is None else self.read_settings(config)
        notes.extend(settings.notes)
        choice = base.choose_weights(detected.weights, ema, notes, source=source)
        tensors = choice.weights.tensors
        arguments = infer_w86_unet(shapes_of(tensors))
        notes.append("architecture inferred from names and shapes, which tell all of it")
        found = self.built(
            arguments, tensors, notes, base.INFERRED, choice.spare, source=source, ema=choice.averaged
        )
        found.network.get_submodule("time_embedding.timembedding.0").requires_grad_(False)
        if settings.image_size is None:
            settings = replace(settings, image_size=_size_in_file(detected.contents, notes))
        return self.assemble(settings, found)

    def assemble(self, settings: W86Settings, found: base.Found) -> Checkpoint:
        arguments, notes = found.arguments, found.notes
        size = settings.image_size or (32, 32)
        if settings.image_size is None:
            reason = "assumed: the original's default; override with `settings` image_size=N"
            notes.append(assumed(f"size 32x32 ({reason})"))
        schedule = NoiseSchedule.linear(arguments["timesteps"], *(settings.betas or _BETAS))
        line = f"schedule: {one_line(schedule)} (T from the weights, "
        if settings.betas:
            notes.append(f"{line}from the configuration)")
        else:
            reason = (
                "assumed: the original's default betas; override with `settings` beta_start=..., beta_end"
            )
            notes.append(assumed(f"{line}{reason})"))
            reason = "assumed: the original's defaults, flagfile.txt says it; override with `settings`"
            notes.append(
                assumed(
                    f"the network predicts the noise, variance fixedlarge ({reason} prediction=x0, variance)"
                )
            )
        return self.checkpoint(
            found,
            sample_shape=(arguments["out_channels"], *size),
            schedule=schedule,
            convention=SamplingConvention(spacing="ddim", variance=settings.variance),
            prediction=settings.prediction,
        )

    def read_settings(self, config: Config) -> W86Settings:
        """The original's flags, or its constructors' arguments as JSON."""
        root = config.root
        unet, diffusion = root.inside("unet"), root.inside("diffusion")
        timesteps = (unet if "T" in unet else diffusion).integer("T", 1000)
        betas = (diffusion.number("beta_1", _BETAS[0]), diffusion.number("beta_T", _BETAS[1]))
        check_schedule(root.where, *betas, timesteps)
        places = [(section, name) for section in (root, diffusion) for name in ("img_size", "image_size")]
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
            image_size=first(Section.sides, *places),
            betas=betas,
            variance=diffusion.choice("var_type", _VARIANCES, "fixedlarge"),
            prediction=diffusion.choice("mean_type", _PREDICTIONS, "epsilon"),
            notes=(
                *base.defaults_of(diffusion, ("beta_1", "beta_T"), base.SET_SCHEDULE),
                *base.defaults_of(diffusion, ("mean_type",), "override with `settings` prediction=x0"),
                *base.defaults_of(diffusion, ("var_type",), "override with `settings` variance=small"),
            ),
        )

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write ``net_model``, ``ema_model`` and, for the image size, ``x_T``, and JSON of the flags."""
        _, start, end = schedule_ends(model)
        arguments = model.architecture["unet"]["args"]
        variances = {ours: theirs for theirs, ours in _VARIANCES.items()}
        predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
        config = {
            "unet": {
                "T": model.schedule.timesteps,
                "ch": arguments["ch"],
                "ch_mult": list(arguments["ch_mult"]),
                "attn": list(arguments["attention_levels"]),
                "num_res_blocks": arguments["num_res_blocks"],
                "dropout": arguments.get("dropout", 0.0),
            },
            "diffusion": {
                "beta_1": start,
                "beta_T": end,
                "var_type": word_for(model.convention.variance, variances, "variance"),
                "mean_type": word_for(model.prediction, predictions, "prediction"),
            },
            "img_size": square_side(model),
        }
        noise = torch.zeros(1, *model.sample_shape)
        content = {"net_model": dict(weights), "ema_model": dict(weights), "step": 0, "x_T": noise}
        return write_checkpoint(path, content, config)


def _size_in_file(contents: Any, notes: list[str]) -> tuple[int, int] | None:
    """Image size from ``x_T``, the noise that the original keeps in its file to draw the same samples."""
    noise = contents.get("x_T") if isinstance(contents, Mapping) else None
    if isinstance(noise, torch.Tensor) and noise.dim() == 4 and 1 <= min(noise.shape[2:]) <= 1 << 14:
        notes.append(f"size {noise.shape[2]}x{noise.shape[3]} (from the file's x_T)")
        return int(noise.shape[2]), int(noise.shape[3])
    return None


@inferring("U-Net", "or no such network")
def infer_w86_unet(shapes: Shapes) -> dict[str, Any]:
    """Arguments of :class:`bidm_cli.networks.w86_unet.W86UNet` from its weights."""
    timesteps, ch = shapes["time_embedding.timembedding.0.weight"]
    levels = _levels(shapes)
    firsts = [f"downblocks.{level[0]}" for level in levels]
    return {
        "timesteps": timesteps,
        "in_channels": shapes["head.weight"][1],
        "out_channels": shapes["tail.2.weight"][0],
        "ch": ch,
        "ch_mult": [shapes[f"{block}.block1.2.weight"][0] // ch for block in firsts],
        "num_res_blocks": len(levels[0]),
        "attention_levels": [i for i, block in enumerate(firsts) if f"{block}.attn.proj_q.weight" in shapes],
    }


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
