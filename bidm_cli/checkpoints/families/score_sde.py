"""yang-song/score_sde_pytorch: ``checkpoint_N.pth`` with ``model`` and ``ema``; JSON of its configurations.

Variance-preserving (VP) models on positional embeddings: DDPM, DDPM++ and NCSN++. The network predicts the
noise; index i of the schedule is the original's label i (time i / 999), its betas those of the original's
discretisation (``VPSDE`` in sde_lib.py), beta_min / N to beta_max / N. The averages are a list without names,
in the order of the network's parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed, left_out
from bidm_cli.checkpoints.exporting import schedule_ends, square_side, word_for, write_checkpoint
from bidm_cli.checkpoints.families.ddpm import assumed_size
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.schedules import check_schedule, one_line
from bidm_cli.checkpoints.reading.shapes import Shapes, inferring
from bidm_cli.checkpoints.reading.state import shapes_of
from bidm_cli.checkpoints.value_range import Range, value_range
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_BETAS = (0.1, 20.0)
_SCALES = 1000
_NIN = re.compile(r"(.*\.NIN_\d)\.(W|b)")
_NUMBER = re.compile(r"all_modules\.(\d{1,5})\.(.+)")
_MOST_LAYERS = 4096
Kind = Literal["block", "attention", "resample block", "resample", "pyramid", "other"]
Layer = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ScoreSettings(base.NetworkSettings):
    """Settings of a configuration; None where it does not say.

    Attributes:
        network: arguments of :class:`bidm_cli.networks.score_unet.ScoreUNet` that weights do not tell.
        time_scale: continuous models see a time that runs to 999 whatever the number of steps.
    """

    network: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    schedule: NoiseSchedule | None = None
    time_scale: float = 1.0


@base.register_family
class ScoreSDE(base.OneNetworkFamily[ScoreSettings]):
    """yang-song/score_sde_pytorch."""

    signature = base.Signature(
        "score-sde",
        "score_sde_pytorch (DDPM, DDPM++, NCSN++)",
        (
            ("all_modules.0.weight", "all_modules.2.weight", "all_modules.3.GroupNorm_0.weight"),
            ("all_modules.0.W", "all_modules.1.weight", "all_modules.4.GroupNorm_0.weight"),
        ),
    )
    network_kind = "score_unet"
    exports_value_range = True

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        model = values.get("model")
        return "yaml" if isinstance(model, dict) and {"nf", "ch_mult"} <= model.keys() else None

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        settings = ScoreSettings() if config is None else self.read_settings(config)
        notes.extend(settings.notes)
        choice = base.choose_weights(detected.weights, ema, notes, source=source)
        tensors = _renamed(choice.weights.tensors)
        arguments = infer_score_unet(shapes_of(tensors)) | settings.network
        notes.append("architecture inferred from numbers, names and shapes")
        about: dict[str, Any] = {"source": source, "ema": choice.averaged}
        found = self.built(arguments, tensors, notes, ignored={"sigmas", *choice.spare}, **about)
        if ema and detected.unplaced:
            place, why = next(iter(detected.unplaced.items()))
            raise BidmError(f"{place}: {why}; load the file with `ema=False`")
        return self.assemble(settings, found)

    def bare_arguments(self, config: Config, settings: ScoreSettings) -> dict[str, Any]:
        model, data = config.root.section("model"), config.root.section("data")
        size, multiples = settings.image_size or 32, model.numbers("ch_mult")
        resolutions = model.numbers("attn_resolutions")
        return {
            "in_channels": data.integer("num_channels", 3),
            "ch": model.integer("nf"),
            "ch_mult": multiples,
            "num_res_blocks": model.integer("num_res_blocks"),
            "attention_levels": [i for i in range(len(multiples)) if size // 2**i in resolutions],
            **settings.network,
        }

    def assemble(self, settings: ScoreSettings, found: base.Found) -> Checkpoint:
        arguments, notes = found.arguments, found.notes
        schedule, reason = settings.schedule, "from the configuration"
        if schedule is None:
            schedule, reason = _schedule(*_BETAS, _SCALES), "assumed, as all of the project's VP models"
            notes.append(
                assumed(
                    "a variance-preserving (VP) model on images in [-1, 1] (assumed: the file of a VE or "
                    "sub-VP model looks the same, and its samples would be noise)"
                )
            )
            notes.append(
                assumed(
                    f"group norms of {arguments['norm_groups'] or 'up to 32'} groups, sums with a shortcut "
                    f"{'divided by sqrt 2' if arguments['skip_rescale'] else 'as they are'} (assumed, as "
                    f"{'NCSN++ and DDPM++' if arguments['kind'] == 'biggan' else 'DDPM'}; override with "
                    "`settings` norm_groups=N, skip_rescale=true or false)"
                )
            )
        line = f"schedule: {one_line(schedule)} ({reason}; {base.SET_SCHEDULE})"
        notes.append(assumed(line) if settings.schedule is None else line)
        size = settings.image_size or assumed_size(arguments, notes)
        return self.pixel_checkpoint(
            settings,
            found,
            sample_shape=(arguments["in_channels"], size, size),
            schedule=schedule,
            convention=SamplingConvention(spacing="ddim", variance="large"),
            time_scale=settings.time_scale,
        )

    def read_settings(self, config: Config) -> ScoreSettings:
        """JSON or YAML with the sections of the original's configurations."""
        root = config.root
        model, data, training = (root.section(name) for name in ("model", "data", "training"))
        sde = training.text("sde", "vpsde").lower()
        if sde != "vpsde":
            raise BidmError(
                f"{training.where}: the SDE {sde!r} is not supported; bidm has variance-preserving ones"
            )
        for section, name, wanted in (
            (model, "embedding_type", "positional"),
            (model, "progressive", "none"),
            (model, "nonlinearity", "swish"),
            (model, "scale_by_sigma", False),
            (model, "conditional", True),
        ):
            if section.get(name, wanted) != wanted:
                raise BidmError(f"{section.where}: {name} {section.get(name)} is not supported, {wanted} is")
        size = first(Section.side, (data, "image_size"))
        scales = model.integer("num_scales", _SCALES)
        betas = (model.number("beta_min", _BETAS[0]), model.number("beta_max", _BETAS[1]))
        check_schedule(model.where, *betas, scales, largest_beta=scales)
        continuous = training.flag("continuous", True) and scales != _SCALES
        time_scale = (_SCALES - 1) / (scales - 1) if continuous else 1.0
        return ScoreSettings(
            network=_network_settings(model),
            image_size=size,
            schedule=_schedule(*betas, scales),
            time_scale=time_scale,
            value_range=_value_range(data),
            notes=(
                *base.defaults_of(training, ("sde",), "put it there"),
                *base.defaults_of(model, ("num_scales", "beta_min", "beta_max"), base.SET_SCHEDULE),
                *_passed_over(data),
            ),
        )

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write ``model`` and ``ema`` of a checkpoint_N.pth, and JSON with the configuration's sections."""
        word_for(model.prediction, {"epsilon": ""}, "prediction")
        named = _original_names(weights)
        content = {"model": {f"module.{name}": tensor for name, tensor in named.items()}, "step": 0}
        content["ema"] = {"decay": 0.9999, "num_updates": 0, "shadow_params": list(named.values())}
        return write_checkpoint(path, content, _original_config(model))


def _value_range(data: Section) -> tuple[Range, str] | None:
    """The original's scaler (datasets.py): [-1, 1] if centered, else [0, 1]."""
    return None if data.flag("centered", True) else ("unit", f"centered false in {data.where}")


def _passed_over(data: Section) -> list[str]:
    if not data.flag("uniform_dequantization"):
        return []
    note = "uniform_dequantization true is passed over: bidm's training images get no such noise"
    return [left_out(f"{note} ({data.where})")]


def _original_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`_renamed`."""
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".NIN_" in name and name.endswith(".weight"):
            tensor = tensor.flatten(1).T.contiguous()
        if ".NIN_" in name:
            name = name.replace(".bias", ".b").replace(".weight", ".W")
        named[name] = tensor
    return named


def _original_config(model: DiffusionModel) -> dict[str, Any]:
    _, start, end = schedule_ends(model)
    word_for(str(value_range(model)), {"None": True, "unit": False}, "range of values")
    arguments, timesteps = model.architecture["unet"]["args"], model.schedule.timesteps
    size = square_side(model)
    network = {
        "name": "ddpm" if arguments.get("norm_groups") is not None else "ncsnpp",
        "nf": arguments["ch"],
        "ch_mult": list(arguments["ch_mult"]),
        "num_res_blocks": arguments["num_res_blocks"],
        "attn_resolutions": [size // 2**level for level in arguments["attention_levels"]],
        "resblock_type": arguments["kind"],
        "progressive_input": "residual" if arguments.get("input_pyramid") else "none",
        **{key: arguments.get(key, False) for key in ("skip_rescale", "fir")},
        "resamp_with_conv": arguments.get("resamp_with_conv", True),
        "dropout": arguments.get("dropout", 0.0),
        "num_scales": timesteps,
        "beta_min": start * timesteps,
        "beta_max": end * timesteps,
    }
    return {
        "model": network,
        "data": {
            "image_size": size,
            "num_channels": arguments["in_channels"],
            "centered": value_range(model) is None,
        },
        "training": {"sde": "vpsde", "continuous": model.time_scale != 1.0},
    }


def _schedule(beta_min: float, beta_max: float, scales: int) -> NoiseSchedule:
    return NoiseSchedule.linear(scales, beta_min / scales, beta_max / scales)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under this package's names: NIN layers as 1x1 convolutions."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _NIN.fullmatch(name)
        if match and match[2] == "W" and tensor.dim() != 2:
            raise BidmError(f"the weight {name} has the odd shape {list(tensor.shape)}")
        if match:
            name = f"{match[1]}.{'bias' if match[2] == 'b' else 'weight'}"
        renamed[name] = tensor.T[:, :, None, None] if match and match[2] == "W" else tensor
    return renamed


def _network_settings(model: Section) -> dict[str, Any]:
    """Arguments of the network that a configuration says and the weights do not."""
    plain = model.text("name", "ncsnpp") == "ddpm"
    kind = "ddpm" if plain else model.text("resblock_type", "biggan").lower()
    pyramid = model.text("progressive_input", "none").lower()
    if kind not in ("ddpm", "biggan") or pyramid not in ("none", "residual"):
        raise BidmError(f"{model.where}: resblock_type {kind}, progressive_input {pyramid} is not supported")
    fir = model.flag("fir") and not plain
    if fir and kind == "ddpm":
        raise BidmError(f"{model.where}: fir with resblock_type ddpm is not supported")
    return {
        "kind": kind,
        "norm_groups": 32 if plain else None,
        "skip_rescale": model.flag("skip_rescale") and not plain,
        "fir": fir,
        "input_pyramid": pyramid == "residual" and not plain,
        "resamp_with_conv": model.flag("resamp_with_conv", True),
        "dropout": model.number("dropout", 0.0),
    }


@inferring("U-Net", "or a network that bidm does not have")
def infer_score_unet(shapes: Shapes) -> dict[str, Any]:
    """Arguments of :class:`bidm_cli.networks.score_unet.ScoreUNet` from its weights by this package's names.

    The layers' order tells levels, blocks and attention, their names the kind of block and the pyramid. What
    leaves no trace is as in the published networks: "biggan" blocks rescale sums and have NCSN++'s group
    norms, "ddpm" ones neither; the binomial filter is there where the pyramid's layers have its names.
    """
    if "all_modules.0.W" in shapes:
        raise BidmError(
            "a network on Fourier features of the noise level, for variance-exploding (VE) models, which "
            "this version of bidm cannot load; it has the variance-preserving ones on positional embeddings"
        )
    layers = _layers(shapes)
    kinds = _kinds(layers)
    levels = _encoder(kinds)
    ch, in_channels = shapes["all_modules.2.weight"][:2]
    biggan = any("Conv_2.weight" in layer for layer in layers)
    return {
        "in_channels": in_channels,
        "ch": ch,
        "ch_mult": [layers[level[0]]["Conv_0.weight"][0] // ch for level in levels],
        "num_res_blocks": _blocks_of(levels, kinds),
        "attention_levels": [i for i, level in enumerate(levels) if kinds[level[0] + 1] == "attention"],
        "kind": "biggan" if biggan else "ddpm",
        "norm_groups": None if biggan else 32,
        "skip_rescale": biggan,
        "fir": any("Conv2d_0.weight" in layer for layer in layers),
        "input_pyramid": "pyramid" in kinds,
        "resamp_with_conv": all(layers),
    }


def _layers(shapes: Shapes) -> list[Layer]:
    """The shapes of each layer by name, {} for a layer without weights."""
    found: dict[int, Layer] = {}
    for name, shape in shapes.items():
        if match := _NUMBER.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = shape
    count = max(found, default=-1) + 1
    if not 8 <= count <= _MOST_LAYERS:
        raise KeyError("all_modules.*")
    return [found.get(i, {}) for i in range(count)]


def _kinds(layers: list[Layer]) -> list[Kind]:
    """Kind of each layer. A convolution right after a resampler belongs to the pyramid."""
    kinds: list[Kind] = []
    for layer in layers:
        kind = _kind(layer)
        if kind == "resample" and kinds[-1] in ("resample", "resample block"):
            kind = "pyramid"
        kinds.append(kind)
    return kinds


def _kind(layer: Layer) -> Kind:
    if not layer:
        return "resample"
    if "NIN_3.weight" in layer:
        return "attention"
    if "Dense_0.weight" in layer:
        out, channels = layer["Conv_0.weight"][:2]
        return "resample block" if "Conv_2.weight" in layer and out == channels else "block"
    if "Conv2d_0.weight" in layer:
        return "pyramid"
    if "Conv_0.weight" in layer:
        out, channels = layer["Conv_0.weight"][:2]
        return "resample" if out == channels else "pyramid"
    return "other"


def _encoder(kinds: list[Kind]) -> list[list[int]]:
    """The numbers of each level's blocks, finest first; the last one's go on into middle and decoder."""
    resamplers = [i for i, kind in enumerate(kinds) if kind in ("resample", "resample block")]
    # Half of them lead down, half up.
    ends = [2, *resamplers[: len(resamplers) // 2], len(kinds)]
    levels = [[i for i in range(start + 1, end) if kinds[i] == "block"] for start, end in pairwise(ends)]
    if len(resamplers) % 2 or not all(levels):
        raise KeyError("all_modules.* of the encoder")
    return levels


def _blocks_of(levels: list[list[int]], kinds: list[Kind]) -> int:
    """Blocks a level; with one level only, from the number of all blocks: n, two in the middle, n + 1."""
    return len(levels[0]) if len(levels) > 1 else (kinds.count("block") - 3) // 2
