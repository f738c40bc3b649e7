"""Trial steps of a dry run: memory of a process, and images that are encoded."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest
import torch

from bidm_cli.distill.training_data import DataOptions
from bidm_cli.parallel.processes import Processes
from bidm_cli.recipe import Recipe
from bidm_cli.report import dry_run, trial
from bidm_cli.report.trial import Trial, resident_bytes, try_steps
from tests.cli.running import DEMO
from tests.distill.conftest import TINY, make_teacher

CPU = torch.device("cpu")


def test_memory_is_what_was_measured_and_the_rows_that_were_not_tried():
    tried = Trial(0.0, 0.0, weights=100, kept=10, kept_per_row=5, rows=4, peak=1000)
    assert [tried.bytes_of(rows, 50) for rows in (2, 4, 6)] == [1000, 1000, 1010]
    assert Trial(0.0, 0.0, weights=100, kept=10, kept_per_row=5).bytes_of(2, loaded=50) == 170


def test_a_trial_knows_the_highest_memory_of_its_process():
    before = resident_bytes(CPU)
    found = try_steps(make_teacher(), Recipe.parse(TINY), 2, Processes())
    assert found.rows == 2 and found.peak >= before > 1 << 26 and found.encoding == 0


def test_counting_what_a_step_keeps_keeps_nothing(monkeypatch):
    """The highest memory would be that of several steps."""
    kept, living = trial._kept, list[int]()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    def watched(*arguments):
        found = kept(*arguments)
        living.append(tensors())
        return found

    monkeypatch.setattr(trial, "_kept", watched)
    try_steps(make_teacher(), Recipe.parse(TINY), 2, Processes())
    assert len(living) == 2 and living[0] == living[1]


def test_images_that_are_encoded_take_longer(monkeypatch):

    from bidm_cli.checkpoints.open import load_checkpoint

    model, encoded = load_checkpoint(DEMO / "ldm4_peeps.ckpt"), list[torch.Size]()
    encode = model.encode

    def counted(self, images):
        encoded.append(images.shape)
        return encode(images)

    monkeypatch.setattr(type(model), "encode", counted)
    monkeypatch.setattr(trial, "_fastest", lambda run, trainer: (run(), 1.0 + len(encoded))[1])
    found = try_steps(model, Recipe.load("w1a1"), 2, Processes(), (3, 32, 32))
    assert set(encoded) == {torch.Size([1, 3, 32, 32])} and len(encoded) >= 4 and found.encoding > 0


@pytest.mark.parametrize("latents", [False, True])
def test_the_plan_counts_the_encoding_of_images_alone(latents, tmp_path, monkeypatch):
    from bidm_cli.checkpoints.open import load_checkpoint

    costs = Trial(0.0, 1.0, 100, 10, 5, 2, 1000, encoding=10.0)
    asked: list[object] = []

    def tried(model, recipe, rows, here, images):
        asked.append(images)
        return costs if images else Trial(0.0, 1.0, 100, 10, 5, 2, 1000)

    monkeypatch.setattr(dry_run, "try_steps", tried)
    model, data = load_checkpoint(DEMO / "ldm4_peeps.ckpt"), DEMO / "faces.npz"
    if latents:
        data = tmp_path / "latents.npy"
        np.save(
            data,
            np.random.default_rng(0).standard_normal((8, *model.sample_shape), np.float32),
        )
    recipe = Recipe.load("w1a1").override("train", steps=10, batch_size=4)
    text = dry_run.describe(model, recipe, DEMO / "ldm4_peeps.ckpt", DataOptions(data))
    assert asked == [None if latents else (3, 32, 32)]
    (line,) = re.findall(r"\n  time +(about.*)", text)
    # 40 rows of a second; nearly as many of 4,000 images, at 10 seconds each.
    expected = "40.0 s in all, " if latents else "7.3 min in all with 6.6 min to encode 40 images"
    assert line.startswith("about 4.0 s per step, ") and expected in line, line
