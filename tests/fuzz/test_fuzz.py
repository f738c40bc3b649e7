"""Thousands of mutated files of every container: each is refused in one line or loads; nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from tests.checkpoints.conftest import DDIM_CONFIG, KL, LDM_CONFIG, ldm_state, weights
from tests.checkpoints.test_diffusers import SCHEDULER, UNET, _shards, _unet_state
from tests.checkpoints.test_wrappers import DIT
from tests.data.test_image_sets import png
from tests.data.test_tar_images import write_tar
from tests.distill.first_stage.test_binary_decoder import recipe_of as decoder_recipe
from tests.distill.first_stage.test_binary_decoder import student_of
from tests.packed.conftest import small_student
from tests.packed.format.test_first_stage import latent_model

SMALL: dict[str, Any] = {**DIT, "depth": 1, "mlp_width": 32}
COUNT = 4400


def _files(folder: Path) -> None:
    """A small file of each container."""
    folder.mkdir()
    state = weights("dit", SMALL)
    content = {"model": state, "ema": state, "args": {"model": "own", "num_classes": 3}}
    torch.save(content, folder / "zip.pt")
    torch.save(state, folder / "plain.pt", _use_new_zipfile_serialization=False)
    newer = {"model": state, "losses": deque([0.1]), "options": SimpleNamespace(lr=0.1), "names": {"a", b"b"}}
    torch.save(newer, folder / "protocol4.pt", pickle_protocol=4)
    torch.save(newer, folder / "protocol5.pt", pickle_protocol=5, _use_new_zipfile_serialization=False)
    save_file(state, str(folder / "flat.safetensors"))
    small = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": []}
    unet = {**LDM_CONFIG["model"]["params"]["unet_config"]["params"], **small}
    lightning = {"epoch": 3, "pytorch-lightning_version": "1.4.2", "callbacks": {"a": {"b": 1}}}
    torch.save({**lightning, "state_dict": ldm_state(unet=unet, first_stage=None)}, folder / "lightning.ckpt")
    torch.save({"state_dict": weights("kl_first_stage", {**KL, "ch_mult": [1]})}, folder / "vae.ckpt")
    (folder / "ldm.yaml").write_text(yaml.safe_dump(LDM_CONFIG))
    (folder / "ddim.yml").write_text(yaml.safe_dump(DDIM_CONFIG))
    np.savez(folder / "images.npz", np.zeros((2, 8, 8, 3), np.uint8), np.arange(2))
    image = png(np.zeros((8, 8, 3), np.uint8))
    for name, mode in (("images.tar", "w"), ("images.tgz", "w:gz")):
        write_tar(folder / name, {"a" * 120 + "/1.png": image, "b/2.png": image, "b/2.cls": b"1"}, mode)
    for name in ("unet", "scheduler"):
        (folder / "diffusers" / name).mkdir(parents=True)
    (folder / "diffusers" / "unet" / "config.json").write_text(json.dumps(UNET))
    (folder / "diffusers" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    _shards(folder / "diffusers" / "unet", _unet_state())
    recipe = Recipe.load("w1a1").to_json()
    write_packed(folder / "packed.bidm", *pack_model(small_student(), recipe))
    for form in ("int8", "int6"):
        recipe["first_stage"]["weights"] = form
        write_packed(folder / f"{form}.bidm", *pack_model(latent_model("vq"), recipe))
    binary = decoder_recipe()
    write_packed(folder / "decoder.bidm", *pack_model(student_of(latent_model(), binary), binary.to_json()))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory by Linux' /proc")
def test_mutated_files_are_refused_in_one_line_or_load(tmp_path: Path) -> None:
    _files(tmp_path / "files")
    command = [sys.executable, "-m", "tests.fuzz.mutations", str(tmp_path / "files"), "0", str(COUNT)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, f"crashed, or took too long or too much memory: {done.stderr[-2000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert "failed" not in counts, f"{counts['failed']}\n{counts['where']}"
    assert counts["refused"] + counts["loaded"] == COUNT
    # Each file has less than two megabytes.
    assert counts["megabytes"] < 150
    assert counts["refused"] > COUNT / 4 and counts["loaded"] > COUNT / 20
