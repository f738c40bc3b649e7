"""The promise of the README, on the real-format checkpoints: compress, sample, report."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors
from PIL import Image

CHECKPOINTS = {
    "ldm_unconditional_vq4": ("model.ckpt", [], []),
    "ldm_class_conditional": (
        "model.ckpt",
        ["--set", "null_label=10"],
        ["--label", "3", "--guidance", "2.5"],
    ),
    "ddpm_ermongroup": ("ckpt.pth", [], []),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def packed(request, shared, tmp_path_factory):
    """A packed file, made where the original is, then moved where neither it nor its config is."""
    import os
    import sys

    from bidm_cli.cli.main import main

    name, loading, options = CHECKPOINTS[request.param]
    work = tmp_path_factory.mktemp(request.param)
    original = work / "original"
    shutil.copytree(shared / "checkpoints" / request.param, original, copy_function=shutil.copy)
    here, argv = os.getcwd(), sys.argv
    os.chdir(work)
    try:
        sys.argv = ["bidm", "compress", str(original / name), "--recipe", "w1a1", "--synthetic", *loading]
        sys.argv += ["--steps", "2", "--batch-size", "2", "--run-dir", "run", "-o", "alone/x.bidm"]
        main()
    finally:
        os.chdir(here)
        sys.argv = argv
    shutil.rmtree(original)
    return work / "alone" / "x.bidm", options


def test_samples_without_the_original(packed, bidm, tmp_path):
    file, options = packed
    called = bidm("sample", file, "-n", 2, "--steps", 4, "--out", tmp_path / "s", "--npz", *options)
    assert called.code == 0, called.err
    pictures = sorted(p for p in (tmp_path / "s").glob("*.png") if p.name != "grid.png")
    assert len(pictures) == 2 and (tmp_path / "s" / "grid.png").is_file()
    with np.load(tmp_path / "s" / "samples.npz") as saved:
        array = saved["arr_0"]
    assert array.dtype == np.uint8 and array.shape[0] == 2
    assert np.array_equal(np.asarray(Image.open(pictures[1])), array[1])


def test_reports_what_was_saved(packed, bidm, tmp_path):
    file, _ = packed
    called = bidm("report", file, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert called.code == 0, called.err
    assert "Trajectory error" in called.out
    cost = json.loads((tmp_path / "r.json").read_text())["models"][0]["cost"]
    assert cost["storage_ratio"] > 8 and cost["ops_ratio"] > 8
    assert cost["ops_ratio_with_attention"] < cost["ops_ratio"]
    assert "<html" in (tmp_path / "r.html").read_text()


def test_any_safetensors_reader_opens_it_and_its_bits_are_bits(packed):
    file, _ = packed
    with safetensors.safe_open(file, "np") as handle:
        record = json.loads(handle.metadata()["bidm"])
        binary = [layer for layer in record["layers"] if layer["kind"] == "binary"]
        assert binary
        for layer in binary:
            bits = handle.get_tensor(f"unet.{layer['name']}.weight_bits")
            geometry = layer["geometry"]
            fan_in = geometry["in_channels"] * geometry["kernel"][0] * geometry["kernel"][1]
            assert bits.dtype == np.uint8
            assert bits.shape == (geometry["out_channels"], (fan_in + 7) // 8)
    assert record["provenance"]["steps"] == 2 and len(record["provenance"]["sha256"]) == 64


def test_the_backends_draw_the_same_images(packed, bidm, tmp_path):
    file, options = packed
    arrays = []
    for backend in ("torch", "numba"):
        out = tmp_path / backend
        called = bidm(
            "sample", file, "-n", 2, "--steps", 1, "--raw", "--backend", backend, "--out", out, *options
        )
        assert called.code == 0, called.err
        arrays.append(np.load(out / "samples.npy"))
    # One step: later ones magnify the few signs that rounding flips in these random networks.
    assert np.abs(arrays[0] - arrays[1]).mean() < 2e-2 * np.abs(arrays[0]).mean()


def test_inspect_and_export_take_a_packed_file(packed, bidm, tmp_path):
    file, _ = packed
    called = bidm("inspect", file, "--json", tmp_path / "i.json")
    assert called.code == 0 and "packed file" in called.out
    assert json.loads((tmp_path / "i.json").read_text())["recipe"]["name"] == "w1a1"
    exported = tmp_path / "back.ckpt"
    assert bidm("export", file, "-o", exported).code == 0
    called = bidm("sample", exported, "-n", 1, "--steps", 2, "--raw", "--out", tmp_path / "e", *packed[1])
    assert called.code == 0, called.err


def test_two_runs_with_the_same_seed_give_the_same_bytes(shared, bidm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = shared / "checkpoints" / "ddpm_ermongroup" / "ckpt.pth"
    for name in ("a", "b"):
        called = bidm(
            "compress", checkpoint, "--synthetic", "--steps", 2, "--batch-size", 2, "-o", f"{name}.bidm"
        )
        assert called.code == 0, called.err
        assert bidm("sample", f"{name}.bidm", "-n", 2, "--steps", 3, "--out", name).code == 0
    assert (tmp_path / "a.bidm").read_bytes() == (tmp_path / "b.bidm").read_bytes()
    for picture in (tmp_path / "a").glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "b" / picture.name).read_bytes()
