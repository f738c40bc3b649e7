"""A run is resumed with what it was started with, or refused in one line that says what differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.distill.compress import compress
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.networks.stored_precision import keep_until_used
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_teacher

STAGE = {
    "kind": "kl_first_stage",
    "args": {
        "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
        "attention_levels": [], "z_channels": 1, "embed_dim": 1,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(teacher, recipe=TINY, **kwargs):
    return compress(teacher, Recipe.parse(recipe), "x.bidm", run_dir="r", steps=1, **kwargs)


def with_stage(teacher, seed=0):
    torch.manual_seed(seed)
    teacher.first_stage = build(STAGE)
    teacher.architecture = {**teacher.architecture, "first_stage": STAGE}
    return teacher


def change_prediction(teacher):
    teacher.prediction = "v"


def change_schedule(teacher):
    teacher.schedule = NoiseSchedule.linear(1000, 1e-4, 0.03)


def change_convention(teacher):
    teacher.convention = replace(teacher.convention, clip="rederive")


def change_family(teacher):
    teacher.family = "ldm"


def change_weights(teacher):
    teacher.unet.get_parameter("conv_in.bias").data[0] += 1


@pytest.mark.parametrize(
    "change, words",
    [
        (change_prediction, r"prediction epsilon, now v"),
        (change_schedule, r"schedule\.end 0.02, now 0.03"),
        (change_convention, r"convention\.clip none, now rederive"),
        (change_family, r"family ddpm, now ldm"),
        (change_weights, "other weights of the network"),
        (with_stage, "another first stage"),
    ],
)
def test_another_model_does_not_resume(images, tmp_path, change, words):
    run(make_teacher(), data=images)
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    other = make_teacher()
    change(other)
    with pytest.raises(BidmError, match=words) as error:
        run(other, data=images, resume=True)
    assert "`settings`" in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_another_recipe_leaves_the_folder_as_it_was(images, tmp_path):
    run(make_teacher(), data=images)
    before = (tmp_path / "r" / "recipe.yaml").read_text()
    with pytest.raises(BidmError, match="batch_size"):
        run(make_teacher(), TINY.replace("batch_size: 2", "batch_size: 3"), data=images, resume=True)
    assert (tmp_path / "r" / "recipe.yaml").read_text() == before


def test_the_same_model_resumes_in_whichever_precision_its_weights_lie(images, tmp_path):
    teacher = make_teacher()
    teacher.unet.half().float()
    run(teacher, data=images)
    again = make_teacher()
    again.unet = keep_until_used(again.unet.half())
    run(again, data=images, resume=True)


def test_first_stages_of_other_weights_are_told_apart(tmp_path):
    run(with_stage(make_teacher()))
    run(with_stage(make_teacher()), resume=True)
    with pytest.raises(BidmError, match=r"\(another first stage\)"):
        run(with_stage(make_teacher(), seed=1), resume=True)


def test_a_damaged_record_is_refused_in_one_line(images, tmp_path):
    run(make_teacher(), data=images)
    for text in ("", "[1]", "{}", '{"settings": 3, "weights": {}}'):
        (tmp_path / "r" / "model.json").write_text(text)
        with pytest.raises(BidmError, match=r"model\.json cannot be read"):
            run(make_teacher(), data=images, resume=True)
