"""The main job as a function: same seed same bytes, resume, and nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch

from bidm_cli.distill import trainer as trainer_module
from bidm_cli.distill.compress import compress
from bidm_cli.distill.options import CompressOptions
from bidm_cli.distill.trajectory import trajectory_error
from bidm_cli.errors import BidmError
from bidm_cli.networks.stored_precision import keep_until_used
from bidm_cli.packed.format.read import load_packed
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_teacher


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(out, images, **kwargs):
    return compress(make_teacher(), Recipe.parse(TINY), out, data=images, **kwargs)


def test_writes_a_packed_file_that_denoises(images, tmp_path):
    result = run("x.bidm", images)
    packed = load_packed("x.bidm", backend="torch")
    assert packed.denoise(torch.randn(2, 1, 8, 8), torch.tensor([3, 500])).shape == (2, 1, 8, 8)
    assert packed.training["trajectory_error"]["mean"] == pytest.approx(result.trajectory["mean"])
    written = json.loads((result.run_dir / "result.json").read_text())
    assert written["packed"] == str(tmp_path / "x.bidm") and written["steps"] == 4
    assert result.run_dir.name == "model-tiny-1"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(images, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(f"{name}.bidm", images, seed=seed)
    a, b, c = ((tmp_path / f"{name}.bidm").read_bytes() for name in "abc")
    assert a == b and a != c


def test_a_killed_run_resumes_to_the_same_file(images, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_SECONDS", 0.0)
    run("whole.bidm", images)
    steps = 0

    def kill(row):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("broken.bidm", images, run_dir="r", reporter=Reporter(advance=kill))
    assert not (tmp_path / "broken.bidm").exists()
    run("broken.bidm", images, run_dir="r", resume=True)
    assert (tmp_path / "broken.bidm").read_bytes() == (tmp_path / "whole.bidm").read_bytes()


def test_the_trajectory_error_has_the_points_asked_for_or_is_left_out(images, tmp_path):
    said = []
    found = run("x.bidm", images, trajectory_points=4, reporter=Reporter(say=said.append))
    assert found.trajectory["steps"] == 4 and any("4 points" in line for line in said)
    found = run("y.bidm", images, trajectory_points=0)
    assert found.trajectory is None
    assert "trajectory_error" not in load_packed("y.bidm", backend="torch").training
    assert CompressOptions().trajectory_points == 20


def test_data_free(tmp_path):
    result = compress(make_teacher(), Recipe.parse(TINY), "x.bidm", steps=1, batch_size=2)
    assert result.path.is_file() and list(result.run_dir.glob("synthetic-*.npy"))


def test_nothing_of_the_users_is_overwritten(images, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BidmError, match="not a packed file"):
        run("notes.txt", images)
    with pytest.raises(BidmError, match="is a folder"):
        run(".", images)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    run("x.bidm", images, run_dir="r")
    with pytest.raises(BidmError, match="already holds a run"):
        run("y.bidm", images, run_dir="r")
    assert not (tmp_path / "y.bidm").exists()


def test_nothing_to_resume_is_said(images):
    with pytest.raises(BidmError, match="no run"):
        run("x.bidm", images, resume=True)


def test_command_line_values_win_over_the_recipe(images):
    result = run("x.bidm", images, steps=1, batch_size=3, lr=0.5)
    train = load_packed("x.bidm").recipe["train"]
    assert (train["steps"], train["batch_size"], train["lr"]) == (1, 3, 0.5)
    assert "batch_size: 3" in (result.run_dir / "recipe.yaml").read_text()


def test_a_sampler_that_takes_no_eta_is_refused_before_training(images, tmp_path):
    recipe = Recipe.parse(TINY.replace("sampler: {steps: 5}", "sampler: {name: dpm++, eta: 0.5}"), "my.yaml")
    line = 1 + TINY.splitlines().index("sampler: {steps: 5}")
    with pytest.raises(BidmError, match=rf"my\.yaml, line {line}: eta is 0\.5 with dpm"):
        compress(make_teacher(), recipe, "x.bidm", data=images)
    with pytest.raises(BidmError, match=r"train\.batch_size is 0"):
        run("x.bidm", images, batch_size=0)
    assert not list(tmp_path.glob("runs/*"))


def test_options_as_a_record_and_as_keywords(images, tmp_path):
    options = CompressOptions(data=images, steps=1, seed=3)
    compress(make_teacher(), Recipe.parse(TINY), "a.bidm", options=options)
    run("b.bidm", images, steps=1, seed=3)
    assert (tmp_path / "a.bidm").read_bytes() == (tmp_path / "b.bidm").read_bytes()
    with pytest.raises(TypeError, match="unexpected keyword stepz"):
        run("c.bidm", images, stepz=1)


def test_trajectory_error_is_zero_for_the_teacher_itself_and_sees_a_difference():
    teacher, twin, other = make_teacher(0), make_teacher(0), make_teacher(1)
    assert trajectory_error(teacher, twin, n=2, steps=5)["mean"] == 0
    found = trajectory_error(teacher, other, n=2, steps=5)
    assert found["mean"] > 0 and len(found["per_step"]) == 5
    assert found["mean"] == pytest.approx(sum(found["per_step"]) / 5)


def test_trajectory_error_needs_the_right_teacher():
    teacher, other = make_teacher(), make_teacher()
    other.sample_shape = (1, 16, 16)
    with pytest.raises(BidmError, match="give the checkpoint it was made from"):
        trajectory_error(teacher, other, n=2, steps=5)


def test_half_precision_weights_compress_as_their_float32_copy(images, tmp_path):
    stored, plain = make_teacher(), make_teacher()
    stored.unet = keep_until_used(stored.unet.half())
    plain.unet.half().float()
    for name, model in (("stored", stored), ("plain", plain)):
        compress(model, Recipe.parse(TINY), f"{name}.bidm", data=images)
    assert (tmp_path / "stored.bidm").read_bytes() == (tmp_path / "plain.bidm").read_bytes()
