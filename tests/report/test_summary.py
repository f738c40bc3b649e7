"""Run directories, what a packed file says of itself, and the trajectory error measured anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.runs import newest_run, packed_path
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import network_bytes, read_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from bidm_cli.report.pages.page import to_html
from bidm_cli.report.pages.render import first_stage_lines
from bidm_cli.report.pages.summary import Report, measure_first_stage, measure_trajectory, summarize
from tests.packed.format.test_first_stage import latent_model
from tests.report.models import packed_of

TRAINING = {
    "rows": [
        {"step": s, "loss": 1 / s, "noise_loss": 0.9 / s, "feature_loss": 0.1 / s} for s in (10, 20, 30)
    ],
    "final": {"step": 30, "loss": 1 / 30},
    "trajectory_error": {
        "mean": 0.5,
        "relative": 0.6,
        "per_step": [0.7, 0.3],
        "timesteps": [500, 0],
        "n": 3,
        "steps": 2,
        "seed": 0,
    },
}


def write_run(root: Path, name: str, packed: Path | str, age: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: w1a1\n")
    (folder / "result.json").write_text(json.dumps({"packed": str(packed)}))
    os.utime(folder / "result.json", (1e9 - age, 1e9 - age))
    return folder


def test_the_newest_finished_run(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", "x.bidm", age=50)
    newest = write_run(tmp_path, "b-1", "y.bidm", age=10)
    (tmp_path / "c-1").mkdir()
    assert newest_run(tmp_path) == newest
    with pytest.raises(BidmError, match="no finished run"):
        newest_run(tmp_path / "none")


def test_a_run_directory_stands_for_its_packed_file(tmp_path: Path) -> None:
    (tmp_path / "x.bidm").write_bytes(b"")
    assert packed_path(write_run(tmp_path, "a", tmp_path / "x.bidm", 0)) == tmp_path / "x.bidm"
    assert packed_path(tmp_path / "x.bidm") == tmp_path / "x.bidm"
    with pytest.raises(BidmError, match="which is gone"):
        packed_path(write_run(tmp_path, "b", tmp_path / "gone.bidm", 0))
    unfinished = write_run(tmp_path, "c", "", 0)
    (unfinished / "result.json").unlink()
    with pytest.raises(BidmError, match="not finished"):
        packed_path(unfinished)
    broken = write_run(tmp_path, "d", "", 0)
    (broken / "result.json").write_text("{")
    with pytest.raises(BidmError, match="cannot be read"):
        packed_path(broken)


def test_what_a_packed_file_says_of_itself(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    packed = packed_of(tiny_model, tmp_path / "m.bidm", training=TRAINING)
    report = summarize(packed, packed.path)
    assert report.recipe == "bidm" and report.file_bytes == packed.path.stat().st_size
    assert [row["step"] for row in report.losses] == [10, 20, 30]
    assert report.trajectory is not None and report.trajectory["mean"] == 0.5
    assert "when the file was written" in report.trajectory_source
    found = report.to_json()
    assert (
        found["cost"]["packed_bytes"]
        == found["file_bytes"]["network"]
        == network_bytes(read_packed(packed.path)[1])
    )
    assert found["trajectory_error"]["per_step"] == [0.7, 0.3]
    assert len(found["layers"]) == len(packed.layers)


def test_a_file_without_training_is_reported_too(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    packed = packed_of(tiny_model, tmp_path / "m.bidm")
    report = summarize(packed, packed.path)
    assert report.losses == [] and report.trajectory is None and report.trajectory_source == ""


def test_the_trajectory_error_is_measured_with_the_files_own_steps(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    packed = packed_of(tiny_model, tmp_path / "m.bidm", training=TRAINING)
    report = summarize(packed, packed.path)
    measure_trajectory(report, packed, tiny_model)
    assert report.trajectory is not None and report.trajectory["steps"] == 2
    assert report.trajectory["mean"] != 0.5 and report.trajectory["mean"] > 0
    assert "computed now" in report.trajectory_source


def test_another_teacher_is_noticed(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    packed = packed_of(tiny_model, tmp_path / "m.bidm", training=TRAINING)
    report = summarize(packed, packed.path)
    report.provenance = {"sha256": "aaaa"}
    tiny_model.sha256 = "bbbb"  # type: ignore[attr-defined]
    measure_trajectory(report, packed, tiny_model)
    assert any("not the file that this model was made from" in note for note in report.notes)


def test_both_decoders_on_the_same_latents(tmp_path: Path) -> None:
    model = latent_model()
    write_packed(tmp_path / "m.bidm", *pack_model(model, Recipe.load("w1a1").to_json()))
    packed = load_packed(tmp_path / "m.bidm", backend="torch")
    report = summarize(packed, tmp_path / "m.bidm")
    assert report.first_stage is None and first_stage_lines(report) == []
    measure_first_stage(report, packed, model)
    assert report.decoded is not None and report.first_stage is not None
    original, other = report.decoded.original.astype(float), report.decoded.packed.astype(float)
    assert original.shape == other.shape == (8, 16, 16, 3) and 0 < abs(original - other).max() < 8
    # Rounding to bytes comes on top in the pictures.
    assert report.first_stage["psnr"] > 10 * np.log10(255**2 / np.square(original - other).mean())
    assert 0.99 < report.first_stage["ssim"] <= 1
    (line,) = first_stage_lines(report)
    assert f"{report.first_stage['psnr']:.1f} dB PSNR" in line
    assert "8 latents drawn by the packed model" in line
    page = to_html(Report([report]))
    assert 'class="decoded"' in page and line in page


def test_errors_of_the_decoder_that_the_file_tells(tmp_path: Path) -> None:
    stage = {"psnr": 51.25, "ssim": 0.998, "n": 4}
    metadata, tensors = pack_model(latent_model(), Recipe.load("w1a1").to_json(), {}, {"first_stage": stage})
    write_packed(tmp_path / "m.bidm", metadata, tensors)
    report = summarize(load_packed(tmp_path / "m.bidm", backend="torch"), tmp_path / "m.bidm")
    (line,) = first_stage_lines(report)
    assert "51.2 dB PSNR, 0.9980 SSIM" in line and "4 latents of the training data" in line
