"""Pair of networks for a benchmark: a packed file and its float original.

    with paired(load_packed("model.bidm")) as pair:
        pair.float_model.denoise(x, t), pair.packed.denoise(x, t)

Timings do not depend on the weights' values, so without an original it is rebuilt with random weights.
Networks and first stages are timed apart.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bidm_cli.binary.first_stage import binary_decoder
from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.layer_table import read_table
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.requires import required
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe


@dataclass
class Pair:
    """Packed network (opened from ``path``, without first stage), float original, origin of its weights.

    Attributes:
        decoders: models that have the original's first stage and the packed one; None without these.
    """

    packed: PackedModel
    float_model: DiffusionModel
    path: Path
    origin: str
    decoders: tuple[DiffusionModel, PackedModel] | None = None


@contextlib.contextmanager
def paired(
    model: DiffusionModel,
    teacher: DiffusionModel | None = None,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    backend: str = "auto",
) -> Iterator[Pair]:
    """Open the pair for a packed file, or for a checkpoint or bare architecture and a recipe.

    Raises:
        BidmError: neither a packed file nor a recipe, or a teacher of another shape.
    """
    with tempfile.TemporaryDirectory(prefix="bidm-bench-") as folder:
        path = Path(folder) / "network.bidm"
        if isinstance(model, PackedModel):
            if recipe is not None:
                raise BidmError("a packed file has its recipe inside; leave out `recipe`")
            float_model, origin = teacher, "the teacher"
            _write_network_alone(model.path, path)
        elif recipe is None:
            raise BidmError("an original network can only be timed against a packed one: give `recipe`")
        else:
            float_model, origin = None if model.device.type == "meta" else model, "the checkpoint"
        if float_model is None:
            float_model, origin = with_random_weights(model.metadata()), "random weights"
        if recipe is not None:
            _write_untrained(float_model, recipe, path)
        packed = load_packed(path, device=device, backend=backend)
        if float_model.sample_shape != packed.sample_shape:
            raise BidmError(
                f"the teacher denoises {list(float_model.sample_shape)}, the packed network "
                f"{list(packed.sample_shape)}; give the checkpoint it was made from"
            )
        decoders = _decoders(model, teacher, recipe, Path(folder), device, backend)
        yield Pair(packed, float_model.to(device), path, origin, decoders)


def _decoders(
    model: DiffusionModel,
    teacher: DiffusionModel | None,
    recipe: Recipe | None,
    folder: Path,
    device: str,
    backend: str,
) -> tuple[DiffusionModel, PackedModel] | None:
    """The two models whose first stages are timed, see :class:`Pair`."""
    architecture = model.architecture.get("first_stage")
    if architecture is None or (isinstance(model, PackedModel) and model.first_stage is None):
        return None
    original = copy.copy(teacher or model)
    has_floats = not isinstance(original, PackedModel) and original.device.type != "meta"
    if teacher is None and not (has_floats and original.first_stage):
        original.first_stage = build(architecture).eval().requires_grad_(False).to(device)
    if original.first_stage is None:
        return None
    if isinstance(model, PackedModel):
        return original, model
    assert recipe is not None
    student = copy.copy(original)
    decoder = binary_decoder(student.first_stage, recipe)
    if decoder is not None:
        student.first_stage = decoder.network
    _write_untrained(student, recipe, folder / "whole.bidm", network_alone=False)
    return original, load_packed(folder / "whole.bidm", device=device, backend=backend)


def with_random_weights(metadata: dict[str, Any]) -> DiffusionModel:
    """Build the network that ``metadata()`` describes, with random weights and without its first stage."""
    torch.manual_seed(0)
    architecture = {**metadata["architecture"], "first_stage": None}
    described = {**metadata, "architecture": architecture}
    conditioner = architecture.get("conditioner")
    return DiffusionModel.from_metadata(
        described,
        unet=build(architecture["unet"]),
        conditioner=None if conditioner is None else build(conditioner),
    )


def _write_network_alone(source: Path, path: Path) -> None:
    metadata, tensors = read_packed(source)
    metadata["architecture"] = {**metadata["architecture"], "first_stage": None}
    if metadata.pop("first_stage", None) is not None:
        metadata["requires"] = required(read_table(metadata), metadata["recipe"], metadata)
    kept = {name: t for name, t in tensors.items() if not name.startswith("first_stage.")}
    write_packed(path, metadata, kept)


def _write_untrained(model: DiffusionModel, recipe: Recipe, path: Path, network_alone: bool = True) -> None:
    """Binarize and pack the model without training: right in shape and speed, not in its images."""
    student = copy.copy(model)
    if network_alone:
        student.architecture = {**model.architecture, "first_stage": None}
        student.first_stage = None
    student.unet = copy.deepcopy(model.unet)
    binarize(student.unet, recipe, model.schedule.timesteps)
    write_packed(path, *pack_model(student, recipe.to_json()))
