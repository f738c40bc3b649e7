"""``bidm report``: runs, packed files, image quality with and without weights, JSON and page."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from bidm_cli.report.metrics import feature_cache
from tests.cli.running import DEMO, Runner
from tests.report.models import packed_of, tiny
from tests.report.test_summary import TRAINING, write_run


@pytest.fixture
def bidm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: tmp_path / "cache")
    return Runner(monkeypatch, capsys)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    packed_of(tiny(), tmp_path / "m.bidm", training=TRAINING)
    return tmp_path / "m.bidm"


def write_images(path: Path, seed: int) -> Path:
    images = np.random.default_rng(seed).integers(0, 255, (5, 8, 8), dtype=np.uint8)
    np.savez(path, images=images)
    return path


def test_a_packed_file(bidm: Runner, packed: Path, tmp_path: Path) -> None:
    ran = bidm("report", packed, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert ran.status == 0, ran.err
    for expected in ("recipe bidm", "the paper's convention", "with attention", "Trajectory error: 0.50000"):
        assert expected in ran.out, expected
    (model,) = json.loads((tmp_path / "r.json").read_text())["models"]
    assert model["file_bytes"]["total"] == packed.stat().st_size
    parts = model["file_bytes"]
    assert parts["network"] + parts["first_stage"] + parts["conditioner"] + parts["header"] == parts["total"]
    assert model["training"]["rows"][0]["step"] == 10 and model["trajectory_error"]["mean"] == 0.5
    assert len(model["layers"]) > 40
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


def test_without_a_model_the_newest_run(
    bidm: Runner, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no finished run under ./runs" in bidm.fails("report")
    write_run(tmp_path / "runs", "digits-w1a1-1", packed, age=0)
    ran = bidm("report")
    assert ran.status == 0 and str(packed) in ran.out


def test_several_models_and_an_original(bidm: Runner, packed: Path, tmp_path: Path) -> None:
    ran = bidm("report", packed, DEMO / "digits.pth", "--json", tmp_path / "r.json", "--layers")
    assert ran.status == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())["models"]
    assert [model["recipe"] for model in found] == ["bidm", None]
    assert found[1]["cost"]["ops_ratio"] == 1.0
    assert "up.1.attn.0.proj_out" in ran.out


def test_with_the_teacher_the_trajectory_error_is_measured_anew(
    bidm: Runner, packed: Path, tmp_path: Path
) -> None:
    ran = bidm("report", packed, "--teacher", DEMO / "digits.pth", "--json", tmp_path / "r.json")
    assert ran.status == 0, ran.err
    (model,) = json.loads((tmp_path / "r.json").read_text())["models"]
    assert model["trajectory_error"]["mean"] != 0.5 and model["trajectory_error"]["steps"] == 2
    assert "computed now against digits.pth" in ran.out


def test_image_quality_of_several_sample_sets(bidm: Runner, packed: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    reference, a, b = (write_images(tmp_path / f"{name}.npz", i) for i, name in enumerate("rab"))
    features = (
        "--features",
        "timm:test_vit",
        "--weights",
        tmp_path / "vit.pth",
        "--json",
        tmp_path / "r.json",
    )
    ran = bidm("report", packed, "--reference", reference, "--samples", a, "--samples", b, *features)
    assert ran.status == 0, ran.err
    scores = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert [score["samples"]["path"] for score in scores] == [str(a), str(b)]
    assert all(score["value"] > 0 and score["metric"] == "FD (timm:test_vit)" for score in scores)
    assert "FID" not in ran.out and "below 2,048" in ran.out
    assert bidm("report", packed, "--reference", reference).status == 2


def test_without_weights_the_report_still_comes(
    bidm: Runner, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    images = write_images(tmp_path / "a.npz", 0)
    asked = ("--reference", images, "--samples", images, "--features", "inception")
    ran = bidm("report", packed, *asked, "--json", tmp_path / "r.json")
    assert ran.status == 0, ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith("Note: ")]
    assert "pt_inception-2015-12-05-6726825d.pth" in line and "--weights" in line
    assert "storage of the network" in ran.out
    assert json.loads((tmp_path / "r.json").read_text())["notes"]


def test_with_bench(bidm: Runner, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bidm_cli.report.bench import timing

    quick = timing.BenchOptions(steps=1, rounds=1, layers=False, memory=False)
    monkeypatch.setattr(timing, "BenchOptions", lambda: quick)
    ran = bidm("report", packed, "--bench", "--json", tmp_path / "r.json")
    assert ran.status == 0 and "one step, batch 1" in ran.out, ran.err
    (model,) = json.loads((tmp_path / "r.json").read_text())["models"]
    assert model["bench"]["step"]["packed_seconds"] > 0


def test_errors_are_one_line(bidm: Runner, packed: Path, tmp_path: Path) -> None:
    assert "gone.bidm" in bidm.fails("report", tmp_path / "gone.bidm")
    cut = tmp_path / "cut.bidm"
    cut.write_bytes(packed.read_bytes()[:-100])
    assert "cut.bidm" in bidm.fails("report", cut)
    images = write_images(tmp_path / "a.npz", 0)
    options = ("--reference", images, "--samples", images, "--features")
    assert "unknown feature network" in bidm.fails("report", packed, *options, "vgg")
    missing = ("--reference", tmp_path / "gone", "--samples", images, "--features", "timm:test_vit")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    assert "no such folder" in bidm.fails("report", packed, *missing, "--weights", tmp_path / "vit.pth")
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.html"))


def test_image_quality_needs_no_model(
    bidm: Runner, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command's own help shows it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    reference, samples = (write_images(tmp_path / f"{name}.npz", i) for i, name in enumerate("rs"))
    features = ("--features", "timm:test_vit", "--weights", tmp_path / "vit.pth")
    asked = ("report", "--reference", reference, "--samples", samples, *features)
    ran = bidm(*asked, "--json", "r.json", "--html", "r.html")
    assert (
        ran.status == 0 and "Image quality" in ran.out and "image quality alone: no finished run" in ran.out
    ), ran.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["models"] == [] and found["metrics"][0]["value"] > 0
    assert "Image quality" in (tmp_path / "r.html").read_text()
    write_run(tmp_path / "runs", "digits-w1a1-1", packed, age=0)
    assert str(packed) in bidm(*asked).out
    packed.unlink()
    ran = bidm(*asked)
    assert ran.status == 0 and "m.bidm, which is gone" in ran.out
    assert "no finished run" not in bidm.fails("report")
