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
from torch import nn

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
    if isinstance(model, PackedModel):
        if recipe is not None:
            raise BidmError("a packed file has its recipe inside; leave out `recipe`")
        float_model, origin = teacher, "the teacher"
    elif recipe is None:
        raise BidmError("an original network can only be timed against a packed one: give `recipe`")
    else:
        float_model, origin = None if model.device.type == "meta" else model, "the checkpoint"
    if float_model is None:
        float_model, origin = with_random_weights(model.metadata()), "random weights"
    original = copy.copy(float_model)
    original.architecture, original.first_stage = model.architecture, _float_stage(teacher or model)
    with tempfile.TemporaryDirectory(prefix="bidm-bench-") as folder:
        whole, path = model, Path(folder) / "network.bidm"
        if recipe is not None:
            _write_untrained(original, recipe, Path(folder) / "whole.bidm")
            whole = load_packed(Path(folder) / "whole.bidm", device=device, backend=backend)
        assert isinstance(whole, PackedModel)
        _write_network_alone(whole.path, path)
        packed = load_packed(path, device=device, backend=backend)
        if float_model.sample_shape != packed.sample_shape:
            raise BidmError(
                f"the teacher denoises {list(float_model.sample_shape)}, the packed network "
                f"{list(packed.sample_shape)}; give the checkpoint it was made from"
            )
        has_both = original.first_stage is not None and whole.first_stage is not None
        decoders = (original.to(device), whole) if has_both else None
        yield Pair(packed, float_model.to(device), path, origin, decoders)


def _float_stage(model: DiffusionModel) -> nn.Module | None:
    """First stage of a float model; with random weights where it has none of its own, or a packed one."""
    architecture = model.architecture.get("first_stage")
    if architecture is None:
        return None
    if model.first_stage is None or isinstance(model, PackedModel) or model.device.type == "meta":
        return build(architecture).eval().requires_grad_(False)
    return model.first_stage


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


def _write_untrained(model: DiffusionModel, recipe: Recipe, path: Path) -> None:
    """Binarize and pack the model without training: right in shape and speed, not in its images."""
    student = copy.copy(model)
    student.unet = copy.deepcopy(model.unet)
    binarize(student.unet, recipe, model.schedule.timesteps)
    decoder = binary_decoder(model.first_stage, recipe)
    if decoder is not None:
        student.first_stage = decoder.network
    write_packed(path, *pack_model(student, recipe.to_json()))
