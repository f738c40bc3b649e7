"""The files of a diffusers folder: components, weights in one file or in shards, and older key names.

A folder has a subfolder for each component (``unet/``, ``vae/`` or ``vqvae/``, ``scheduler/``); the oldest
have everything in the root.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bidm_cli.checkpoints.choice import unplaced_notes
from bidm_cli.checkpoints.neighbours import settings_of
from bidm_cli.checkpoints.reading.averages import Alternatives, find
from bidm_cli.checkpoints.reading.config import Section, read_section
from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.checkpoints.reading.state import Weights, state_dicts
from bidm_cli.checkpoints.reading.unpickle import read_file
from bidm_cli.errors import BidmError

UNETS = ("UNet2DModel", "UNet2DConditionModel")
AVERAGES = ("unet_ema", "ema_unet", "ema_model", "ema")
"""Subfolders in which people keep the U-Net's average."""
FIRST_STAGES = ("VQModel", "AutoencoderKL")
_STEM = "diffusion_pytorch_model"
_LONGEST_NAME = 200
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_PROJECTION = re.compile(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Component:
    """A subfolder (or the root, in flat folders) with its ``config.json``."""

    folder: Path
    config: Section

    @property
    def class_name(self) -> str:
        return self.config.text("_class_name", "")


def component(root: Path, names: tuple[str, ...], classes: tuple[str, ...]) -> Component | None:
    """The first of the subfolders ``names`` with a ``config.json``, else the root if its class is one of
    ``classes``; None if there is neither.
    """
    for folder in (*(root / name for name in names), root):
        if (folder / "config.json").is_file():
            found = Component(folder, read_section(folder / "config.json"))
            if folder != root or found.class_name in classes:
                return found
    return None


def scheduler(root: Path) -> Section | None:
    """The configuration of the scheduler in ``root`` or in the pipeline around it; None without one."""
    return next((read_section(path) for path in _scheduler_files(pipeline_of(root))), None)


def pipeline_of(root: Path) -> Path:
    """The folder of the whole pipeline that a model's folder is in; ``root`` itself where there is none.

    Training scripts keep intermediate checkpoints one folder down (``out/checkpoint-500/unet``) and write the
    scheduler and model_index.json into ``out`` (huggingface/diffusers#3379).
    """
    places = [root, Path(os.path.normpath(root / "..")), Path(os.path.normpath(root / ".." / ".."))]
    return next((place for place in places if _scheduler_files(place) or _index(place).is_file()), root)


def in_pipeline(root: Path, names: tuple[str, ...], classes: tuple[str, ...]) -> Component | None:
    """As :func:`component`; else the one in the pipeline around ``root``, if that has a model_index.json."""
    whole = pipeline_of(root)
    found = component(root, names, classes)
    return component(whole, names, classes) if found is None and _index(whole).is_file() else found


def _scheduler_files(folder: Path) -> list[Path]:
    paths = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    return [path for path in paths if path.is_file()]


def _index(folder: Path) -> Path:
    return folder / "model_index.json"


def settings(root: Path) -> list[str]:
    """Settings of the scheduler, as "name: value"; none where its configuration cannot be read."""
    try:
        section = scheduler(root) or scheduler(root.parent)
    except BidmError:
        return []
    return [] if section is None else list(settings_of(section.values))


def names_first_stage(root: Path) -> bool:
    """True if ``model_index.json`` names a first stage, whether it is there or not."""
    path = root / "model_index.json"
    parts = read_section(path).values if path.is_file() else {}
    named = [parts.get(name) for name in ("vqvae", "vae")]
    return any(isinstance(part, list) and any(part) for part in named)


def denoisers(root: Path) -> str:
    """The class of the network that ``model_index.json`` names in a U-Net's place; "" if it names none."""
    path = _index(root)
    if not path.is_file():
        return ""
    parts = read_section(path).values
    for name in ("transformer", "unet", "prior", "denoiser"):
        part = parts.get(name)
        if isinstance(part, list) and len(part) == 2 and isinstance(part[1], str) and part[1] not in UNETS:
            return printable(part[1], 60)
    return ""


def weights_file(folder: Path, ema: bool = True) -> Path:
    """The file (or index of shards) with a component's weights.

    Full precision comes before half, .safetensors before .bin; ``non_ema`` variants are for ``ema`` false.

    Raises:
        BidmError: there is none.
    """
    found = sorted(
        path
        for pattern in (f"{_STEM}*.safetensors*", f"{_STEM}*.bin*")
        for path in folder.glob(pattern)
        if path.is_file() and not re.search(r"-\d+-of-\d+", path.name)
    )
    found = [path for path in found if path.name.endswith((".safetensors", ".bin", ".json"))]
    averaged = [path for path in found if ".non_ema" not in path.name]
    wanted = averaged if ema else [path for path in found if path not in averaged] or averaged
    # Weights files of other names, as people rename them.
    others = [path for path in folder.iterdir() if path.is_file() and path.suffix in _ENDINGS]
    if not wanted and len(others) == 1:
        return others[0]
    if not wanted and (parts := [path for path in folder.iterdir() if is_part(path)]):
        raise BidmError(
            f"{folder} has {len(parts)} parts such as {min(parts).name} but not the index that names all of "
            f"them ({_STEM}.safetensors.index.json); download the whole folder"
        )
    if not wanted:
        raise BidmError(
            f"{folder} has no weights ({_STEM}.safetensors or .bin); download the whole folder, or give its "
            "config.json alone"
        )
    plain = re.compile(_STEM + r"\.(safetensors|bin)(\.index\.json)?")
    return min(wanted, key=lambda path: (
        plain.fullmatch(path.name) is None, ".bin" in path.name, path.name.endswith(".json")
    ))  # fmt: skip


def is_part(path: Path) -> bool:
    """True if a file is one of several that hold a component's weights, or their index, by its name."""
    return re.fullmatch(_STEM + r".*(-\d+-of-\d+.*|\.index(\..+)?\.json)", path.name) is not None


def state_dicts_of(path: Path, alternatives: Alternatives, notes: list[str]) -> list[Weights]:
    """All state dicts of a network with these names in a weights file, or the one of an index of shards.

    Raises:
        BidmError: as :func:`read_weights`.
    """
    if path.suffix == ".json":
        return [Weights("", read_weights(path))]
    contents = read_file(path)
    inside = find(alternatives, state_dicts(contents), contents)
    notes.extend(unplaced_notes(inside))
    return inside.weights or [Weights("", read_weights(path))]


def says_averaged(path: Path, found: Component) -> str:
    """Reason to take a U-Net's weights for averages, in what lies beside them: EMAModel's configuration, or a
    file of the weights as trained; "" without one.
    """
    if {"optimization_step", "update_after_step"} <= found.config.values.keys():
        return f"{found.config.where} is EMAModel's"
    trained = list(path.parent.glob(f"{_STEM}.non_ema.*")) if ".non_ema" not in path.name else []
    return f"{trained[0].name} beside it has the weights as trained" if trained else ""


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file or of an index of shards, under today's names.

    Raises:
        BidmError: a file is missing or damaged, or the index names files elsewhere.
    """
    tensors: dict[str, Tensor] = {}
    for part in _shards(path) if path.suffix == ".json" else [path]:
        found = state_dicts(read_file(part), depth=1)
        if not found:
            raise BidmError(f"{part} holds no tensors by name")
        tensors |= found[0].tensors
    return renamed(tensors)


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BidmError(f"{index} is no index of shards (it has no weight_map)") from error
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name or len(name) > _LONGEST_NAME:
            raise BidmError(f"{index} names {printable(name, 60)!r}, which is not a file beside it; refused")
        if not (index.parent / name).is_file():
            raise BidmError(f"{index} names {name}, which is missing; download the whole folder")
    if not names or len(names) > 1000:
        raise BidmError(f"{index} names {len(names)} files; that is no index of shards")
    return [index.parent / name for name in names]


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older names and shapes as today's.

    Attention was once ``query``, ``key``, ``value``, ``proj_attn`` (1x1 convs in some conversions), and an
    up- or downsampler's conv is in some files twice.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        *stem, last, kind = name.split(".") if name.count(".") >= 2 else ("", "", name)
        if "attentions" in stem and last in _OLD_ATTENTION:
            name = ".".join([*stem, _OLD_ATTENTION[last], kind])
        if last == "Conv2d_0":
            name = ".".join([*stem, "conv", kind])
        if _PROJECTION.search(name) and tensor.dim() == 4 and tuple(tensor.shape[2:]) == (1, 1):
            tensor = tensor.flatten(1)
        found[name] = tensor
    return found
