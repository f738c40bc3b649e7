"""Our networks and samplers give what diffusers' own give: numbers that the library printed, to 1e-4.

``diffusers_reference.json`` holds configurations as the library writes them and its results in short, for the
weights and inputs of :mod:`tests.checkpoints.filled`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.families.diffusers.config import (
    condition_unet_from_config,
    first_stage_from_config,
    unet_from_config,
)
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.networks.registry import build
from bidm_cli.sampling.sample import sample
from tests.checkpoints.filled import filled, probe, waves

REFERENCE = json.loads(Path(__file__).with_name("diffusers_reference.json").read_text())
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _named(part: str) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in REFERENCE[part]}


def write(folder: Path, config: dict[str, Any], name: str = "config.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    section = Section(config, "test")
    if config["_class_name"] == "UNet2DModel":
        return unet_from_config(section)
    if config["_class_name"] == "UNet2DConditionModel":
        return condition_unet_from_config(section)
    return first_stage_from_config(section)[0]


def _state(config: dict[str, Any]) -> dict[str, Tensor]:
    network = build(_architecture(config))
    return filled({name: tensor.shape for name, tensor in network.state_dict().items()})


def component(folder: Path, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> None:
    write(folder, config)
    save_file(state or _state(config), str(folder / WEIGHTS))


def assert_as_expected(found: Tensor, expected: dict[str, Any]) -> None:
    got = probe(found)
    assert got["shape"] == expected["shape"]
    tolerance = 1e-4 * expected["largest"]
    assert got["values"] == pytest.approx(expected["values"], abs=tolerance, rel=0)
    assert got["largest"] == pytest.approx(expected["largest"], abs=tolerance, rel=0)


@pytest.mark.parametrize("name", _named("networks"))
def test_networks(tmp_path: Path, name: str) -> None:
    entry = _named("networks")[name]
    component(tmp_path / "unet", entry["config"])
    checkpoint = load_checkpoint(tmp_path)
    x = waves((2, entry["config"].get("in_channels", checkpoint.sample_shape[0]), 8, 8), 0.5).float()
    context = waves((2, 5, 12), 0.25).float() if checkpoint.context_width else None
    labels = torch.tensor(entry["labels"]) if "labels" in entry else None
    with torch.no_grad():
        assert_as_expected(checkpoint.denoise(x, torch.tensor([17, 803]), context, labels), entry["expected"])
    assert (checkpoint.num_classes is not None) == (labels is not None)


@pytest.mark.parametrize("name", _named("first_stages"))
def test_first_stages(tmp_path: Path, name: str) -> None:
    entry = _named("first_stages")[name]
    config = entry["config"]
    channels = config.get("vq_embed_dim", config["latent_channels"])
    unet = _named("sampling")["clip range"]["unet"]
    unet = {"_class_name": "UNet2DModel", **unet, "in_channels": channels, "out_channels": channels}
    component(tmp_path / "unet", unet)
    component(tmp_path / ("vqvae" if config["_class_name"] == "VQModel" else "vae"), config)
    checkpoint = load_checkpoint(tmp_path)
    assert_as_expected(checkpoint.encode(waves((1, 3, 8, 8), 0.5).float()), entry["encoded"])
    assert_as_expected(checkpoint.decode(waves((1, channels, 4, 4), 0.25).float()), entry["decoded"])


def sampling_checkpoint(tmp_path: Path, entry: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a reference sampling."""
    config = {"_class_name": "UNet2DModel", **entry["unet"]}
    state = _state(config)
    if config["out_channels"] == 6:  # a learned variance that means something
        state["conv_out.bias"][3:] += 0.5
        state["conv_out.weight"][3:] *= 0.02
    component(tmp_path / "unet", config, state)
    write(tmp_path / "scheduler", entry["scheduler"], "scheduler_config.json")
    return load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", _named("sampling"))
def test_sampling(tmp_path: Path, name: str) -> None:
    entry = _named("sampling")[name]
    found = sample(
        sampling_checkpoint(tmp_path, entry),
        steps=6,
        sampler=entry["sampler"],
        eta=entry["eta"],
        x_t=2 * waves((2, 3, 8, 8), 0.5).float(),
        noises=[1.4 * waves((2, 3, 8, 8), k + 2).float() for k in range(6)],
    )
    assert_as_expected(found, entry["expected"])
