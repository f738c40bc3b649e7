"""``bidm report`` of several models: one table, pictures from the same seeds, errors against the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from bidm_cli.report.metrics import feature_cache
from tests.cli.running import DEMO, Runner
from tests.cli.test_report import write_images
from tests.report.models import model_of, packed_of, tiny
from tests.report.test_summary import TRAINING

N, STEPS = 4, 3


@pytest.fixture
def bidm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return Runner(monkeypatch, capsys)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two packed files of one content, one of another recipe, and the original."""
    packed_of(tiny(), tmp_path / "a.bidm", training=TRAINING)  # whose trajectory error has two steps
    shutil.copy(tmp_path / "a.bidm", tmp_path / "same.bidm")
    packed_of(tiny(), tmp_path / "b.bidm", recipe="w1a32", training=TRAINING)
    for suffix in ("pth", "yml"):
        shutil.copy(DEMO / f"digits.{suffix}", tmp_path / f"original.{suffix}")
    return [tmp_path / name for name in ("a.bidm", "same.bidm", "b.bidm", "original.pth")]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("0*.png")}


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sample.json").read_text())["settings"]


def test_all_models_draw_from_the_same_seeds_under_the_same_conditions(
    bidm: Runner, models: list[Path], tmp_path: Path
) -> None:
    asked = ("report", models[-1], *models[:-1], "--draw", N, "--steps", STEPS, "--seed", 5)
    ran = bidm(*asked, "--json", "r.json", "--html", "r.html")
    assert ran.status == 0, ran.err
    drawn = {Path(one["model"]).name: one for one in json.loads(Path("r.json").read_text())["drawn"]}
    assert list(drawn) == ["original.pth", "a.bidm", "same.bidm", "b.bidm"]
    folders = {name: Path(one["samples"]) for name, one in drawn.items()}
    assert all(one["seconds_per_image"] > 0 for one in drawn.values())
    each = [
        {key: value for key, value in settings(one).items() if key != "model"} for one in folders.values()
    ]
    assert all(one == each[0] for one in each[1:]), "clipping, too, though the original's own is none"
    assert each[0]["seed"] == 5 and each[0]["steps"] == STEPS and each[0]["clip"] == "rederive"
    assert images(folders["a.bidm"]) == images(folders["same.bidm"]) != images(folders["b.bidm"])
    # The original's are those that bidm sample draws from this seed.
    shared = ("-n", N, "--steps", STEPS, "--seed", 5, "--clip", "--out", "own")
    assert bidm("sample", models[-1], *shared).status == 0
    assert images(Path("own")) == images(folders["original.pth"]) and len(images(Path("own"))) == N
    page = Path("r.html").read_text()
    for text in (ran.out, page):
        assert "Models side by side" in text and "4 of each model, the same seeds for all" in text
        assert "seed 5" in text and "clip rederive" in text
        assert "original.pth by its own convention: clip none" in text
        assert "DIFFERS" not in text
    assert page.count('alt="Picture') == N * 4
    again = bidm(*asked, "--json", "r.json")
    assert again.status == 0
    assert {one["seconds_per_image"] for one in json.loads(Path("r.json").read_text())["drawn"]} == {None}


def test_each_row_of_the_table_has_its_own_models_distance(bidm: Runner, models: list[Path]) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), "vit.pth")
    reference = write_images(Path("r.npz"), 0)
    features = ("--features", "timm:test_vit", "--weights", "vit.pth")
    drawing = ("--reference", reference, "--draw", N, "--steps", STEPS)
    ran = bidm("report", models[2], models[0], models[-1], *drawing, *features, "--json", "r.json")
    assert ran.status == 0, ran.err
    found = json.loads(Path("r.json").read_text())
    assert [Path(score["samples"]["path"]).name.split("-")[0] for score in found["metrics"]] == [
        "b",
        "a",
        "original",
    ]
    lines = ran.out[ran.out.index("Models side by side") :].splitlines()
    assert [column for column in ("FD (timm:test_vit)", "kernel distance", "recall") if column in lines[2]]
    for name, score in zip(("b.bidm", "a.bidm", "original.pth"), found["metrics"], strict=True):
        (row,) = [line for line in lines[4:7] if line.startswith(name)]
        assert f"{score['value']:.3f}" in row
    assert len({score["value"] for score in found["metrics"]}) == 3


def test_clipping_that_is_asked_for_is_taken_for_all(bidm: Runner, models: list[Path]) -> None:
    ran = bidm("report", models[0], models[-1], "--draw", 2, "--steps", 2, "--no-clip", "--json", "r.json")
    assert ran.status == 0, ran.err
    drawn = json.loads(Path("r.json").read_text())["drawn"]
    assert [settings(Path(one["samples"]))["clip"] for one in drawn] == ["none", "none"]
    assert "a.bidm by its own convention: clip rederive" in ran.out and "original.pth by" not in ran.out


def test_the_only_original_is_the_teacher(bidm: Runner, models: list[Path], tmp_path: Path) -> None:
    ran = bidm("report", models[0], models[-1], "--json", "r.json")
    assert ran.status == 0, ran.err
    assert f"Note: errors are measured against {models[-1]}, the original among the models" in ran.out
    packed, original = json.loads(Path("r.json").read_text())["models"]
    assert packed["trajectory_error"]["mean"] > 0 and original["trajectory_error"] is None
    assert packed["trajectory_error_from"] == "computed now against original.pth"
    named = bidm("report", models[0], "--teacher", models[-1], "--json", "named.json")
    assert named.status == 0
    (same,) = json.loads(Path("named.json").read_text())["models"]
    assert same["trajectory_error"] == packed["trajectory_error"]


def test_which_original_is_not_guessed(bidm: Runner, models: list[Path], tmp_path: Path) -> None:
    for suffix in (".pth", ".yml"):
        shutil.copy(models[-1].with_suffix(suffix), tmp_path / f"second{suffix}")
    ran = bidm("report", models[0], models[-1], tmp_path / "second.pth", "--json", "r.json")
    assert ran.status == 0, ran.err
    assert "no error was measured anew: 2 originals; name one as --teacher" in ran.out
    found = json.loads(Path("r.json").read_text())["models"][0]
    assert found["trajectory_error_from"] == "measured when the file was written"
    assert "errors are measured" not in bidm("report", models[-1]).out


def test_an_original_of_another_shape_is_left_out_aloud(
    bidm: Runner, models: list[Path], tmp_path: Path
) -> None:
    args = {"in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    packed_of(model_of("ddpm_unet", {**args, "attention_levels": [1]}, (3, 8, 8)), tmp_path / "rgb.bidm")
    ran = bidm("report", tmp_path / "rgb.bidm", models[-1])
    assert ran.status == 0, ran.err
    assert f"no error was measured against {models[-1]}, which denoises another shape" in ran.out
    assert "the teacher denoises" in bidm.fails("report", tmp_path / "rgb.bidm", "--teacher", models[-1])
