"""Compress, sample, report on U-Nets of OpenAI, diffusers and w86763777/pytorch-ddpm."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from bidm_cli.networks.registry import build
from tests.checkpoints.test_score_sde import write as write_score_checkpoint

FAMILIES = {
    "openai": ("ema_0.9999_000010.pt", ["--label", "3"]),
    "diffusers": ("", []),
    "w86763777": ("ckpt.pt", []),
    "score-sde": ("checkpoint_1.pth", []),
}
SHARED = {"openai": "guided_diffusion", "diffusers": "diffusers_ldm_vq"}


def _original(family, shared, work):
    """The checkpoint's path, in a folder of its own."""
    folder = work / "original"
    if family in SHARED:
        shutil.copytree(shared / "checkpoints" / SHARED[family], folder, copy_function=shutil.copy)
    elif family == "score-sde":
        folder.mkdir()
        write_score_checkpoint(folder / "checkpoint_1.pth")
    else:
        folder.mkdir()
        arguments = {
            "timesteps": 200,
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_levels": [1],
        }
        torch.manual_seed(0)
        state = build({"kind": "w86_unet", "args": arguments}).state_dict()
        torch.save(
            {"net_model": state, "ema_model": state, "x_T": torch.zeros(1, 3, 16, 16)}, folder / "ckpt.pt"
        )
    return folder / FAMILIES[family][0]


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request, shared, tmp_path_factory):
    """(family, packed file, options for sampling); the original is gone."""
    import os
    import sys

    from bidm_cli.cli.main import main

    family = request.param
    work = tmp_path_factory.mktemp(family)
    original = _original(family, shared, work)
    here, argv = os.getcwd(), sys.argv
    os.chdir(work)
    try:
        sys.argv = ["bidm", "compress", str(original), "--recipe", "w1a1", "--synthetic"]
        sys.argv += ["--steps", "2", "--batch-size", "2", "--run-dir", "run", "-o", "alone/x.bidm"]
        main()
    finally:
        os.chdir(here)
        sys.argv = argv
    shutil.rmtree(work / "original")
    return family, work / "alone" / "x.bidm", FAMILIES[family][1]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_without_the_original(packed, bidm, tmp_path, sampler):
    _, file, options = packed
    called = bidm(
        "sample",
        file,
        "-n",
        2,
        "--steps",
        4,
        "--sampler",
        sampler,
        "--out",
        tmp_path / "s",
        "--npz",
        *options,
    )
    assert called.code == 0, called.err
    with np.load(tmp_path / "s" / "samples.npz") as saved:
        assert saved["arr_0"].dtype == np.uint8 and saved["arr_0"].shape[0] == 2


def test_reports_what_was_saved(packed, bidm, tmp_path):
    family, file, _ = packed
    called = bidm("report", file, "--json", tmp_path / "r.json")
    assert called.code == 0, called.err
    model = json.loads((tmp_path / "r.json").read_text())["models"][0]
    assert model["family"] == family
    assert model["cost"]["storage_ratio"] > 5 and model["cost"]["ops_ratio"] > 5


def test_inspect_takes_the_packed_file(packed, bidm):
    family, file, _ = packed
    called = bidm("inspect", file)
    assert called.code == 0 and f"family {family}" in called.out


def test_inspect_takes_a_folder(shared, bidm, tmp_path):
    folder = shared / "checkpoints" / "diffusers_ldm_vq"
    called = bidm("inspect", folder, "--recipe", "w1a1", "--json", tmp_path / "i.json")
    assert called.code == 0, called.err
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["family"] == "diffusers" and found["kind"] == "checkpoint"
    assert any("config.json" in line for line in found["evidence"])
    called = bidm("inspect", tmp_path)
    assert called.code == 1 and "folder" in called.err and "Traceback" not in called.err


def test_inspect_takes_a_config_json(shared, bidm):
    called = bidm("inspect", shared / "checkpoints" / "diffusers_ldm_vq" / "unet" / "config.json")
    assert called.code == 0 and "bare configuration" in called.out
