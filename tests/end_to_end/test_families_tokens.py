"""compress, sample, report, on families whose networks are transformers or have linear attention."""

from __future__ import annotations

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from tests.checkpoints.conftest import weights

LATENTS = ["--label", "3", "--guidance", "2.5", "--raw"]
CHECKPOINTS = {
    "lucidrains_v2": ("model-1.pt", ["--raw"]),
    "dit": ("DiT-tiny-plain.pt", LATENTS),
    "uvit": ("nnet_ema.pth", ["--raw", "--label", "1"]),
}
SHAPES = {"lucidrains_v2": (2, 3, 16, 16), "dit": (2, 4, 8, 8), "uvit": (2, 3, 8, 8)}
UVIT = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 3,
    "embed_dim": 64,
    "half_depth": 2,
    "num_heads": 1,
    "label_rows": 4,
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def packed(request, shared, tmp_path_factory):
    """(packed file moved away from its original, options of ``bidm sample``, shape of two samples)."""
    from bidm_cli.cli.main import main

    name, options = CHECKPOINTS[request.param]
    work = tmp_path_factory.mktemp(request.param)
    if request.param == "uvit":  # no original at hand
        (work / "original").mkdir()
        torch.save(weights("uvit", UVIT), work / "original" / name)
    else:
        shutil.copytree(shared / "checkpoints" / request.param, work / "original", copy_function=shutil.copy)
    here, argv = os.getcwd(), sys.argv
    os.chdir(work)
    try:
        sys.argv = ["bidm", "compress", f"original/{name}", "--recipe", "w1a1", "--synthetic", "--steps", "2"]
        sys.argv += ["--batch-size", "2", "--run-dir", "run", "-o", "alone/x.bidm"]
        main()
    finally:
        os.chdir(here)
        sys.argv = argv
    shutil.rmtree(work / "original")
    return work / "alone" / "x.bidm", options, SHAPES[request.param]


def test_samples_without_the_original(packed, bidm, tmp_path):
    file, options, shape = packed
    called = bidm("sample", file, "-n", 2, "--steps", 4, "--out", tmp_path / "s", *options)
    assert called.code == 0, called.err
    drawn = np.load(tmp_path / "s" / "samples.npy")
    assert drawn.shape == shape and np.isfinite(drawn).all()
    assert (tmp_path / "s" / "grid.png").is_file() == (shape[1] == 3)


def test_latents_need_raw(packed, bidm, tmp_path):
    file, options, shape = packed
    if shape[1] == 3:
        pytest.skip("a pixel model")
    called = bidm("sample", file, "-n", 1, "--steps", 2, "--out", tmp_path / "s", *options[:-1])
    assert called.code == 1 and "--raw" in called.err


def test_reports_what_was_saved(packed, bidm, tmp_path):
    file, _, _ = packed
    called = bidm("report", file, "--json", tmp_path / "r.json")
    assert called.code == 0, called.err
    cost = json.loads((tmp_path / "r.json").read_text())["models"][0]["cost"]
    assert cost["storage_ratio"] > 8 and cost["ops_ratio"] > 8
    assert cost["macs_with_attention"] > cost["macs"]


def test_the_backends_agree(packed, bidm, tmp_path):
    file, options, _ = packed
    arrays = []
    for backend in ("torch", "numba"):
        out = tmp_path / backend
        called = bidm("sample", file, "-n", 2, "--steps", 1, "--backend", backend, "--out", out, *options)
        assert called.code == 0, called.err
        arrays.append(np.load(out / "samples.npy"))
    assert np.abs(arrays[0] - arrays[1]).mean() < 2e-2 * np.abs(arrays[0]).mean()
