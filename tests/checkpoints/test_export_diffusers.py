"""Each kind of diffusers model comes back from ``bidm export`` as the packed file's float weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bidm_cli.checkpoints.export import export_checkpoint
from bidm_cli.checkpoints.families.diffusers.export import export_folder
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.errors import BidmError
from bidm_cli.packed.model import PackedModel
from tests.checkpoints.test_diffusers_reference import REFERENCE, component, write
from tests.checkpoints.test_export_families import _packed, _same

NETWORKS = {entry["name"]: entry["config"] for entry in REFERENCE["networks"]}
FIRST_STAGES = {entry["name"]: entry["config"] for entry in REFERENCE["first_stages"]}
CLIPPED = {"_class_name": "DDIMScheduler", "clip_sample_range": 2.5, "steps_offset": 1}
THRESHOLDED = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 4.0}


def _opened(folder: Path, unet: dict[str, Any], **parts: dict[str, Any]) -> PackedModel:
    component(folder / "original" / "unet", unet)
    for name, config in parts.items():
        if name == "scheduler":
            write(folder / "original" / name, config, "scheduler_config.json")
        else:
            component(folder / "original" / name, config)
    return _packed(load_checkpoint(folder / "original"), folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(tmp_path: Path, name: str) -> None:
    opened = _opened(tmp_path, NETWORKS[name], scheduler=CLIPPED)
    assert export_checkpoint(opened, tmp_path / "float") == tmp_path / "float" / "unet" / "config.json"
    _same(load_checkpoint(tmp_path / "float"), opened)
    written = json.loads((tmp_path / "float" / "unet" / "config.json").read_text())
    assert written["_class_name"] == NETWORKS[name]["_class_name"]


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages_and_schedulers(tmp_path: Path, name: str) -> None:
    stage = FIRST_STAGES[name]
    channels = stage.get("vq_embed_dim", stage["latent_channels"])
    unet = {**NETWORKS["stable diffusion 1"], "in_channels": channels, "out_channels": channels}
    folder = "vqvae" if stage["_class_name"] == "VQModel" else "vae"
    opened = _opened(tmp_path, unet, **{folder: stage, "scheduler": {**CLIPPED, **THRESHOLDED}})
    export_checkpoint(opened, tmp_path / "float")
    back = load_checkpoint(tmp_path / "float")
    _same(back, opened)
    z, images = torch.randn(1, channels, 4, 4), torch.randn(1, 3, 8, 8)
    assert torch.allclose(back.decode(z), opened.decode(z), atol=1e-5)
    assert torch.allclose(back.encode(images), opened.encode(images), atol=1e-5)


def test_a_file_under_ldms_names_says_what_to_do(tmp_path: Path) -> None:
    """Earlier versions kept a UNet2DConditionModel as LDM's network."""
    opened = _opened(tmp_path, NETWORKS["plain"])
    opened.architecture["unet"]["kind"] = "ldm_unet"
    with pytest.raises(BidmError, match="compress the original again"):
        export_folder(opened, {}, tmp_path / "float")
