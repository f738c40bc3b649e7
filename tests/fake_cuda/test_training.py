"""A training step on a GPU, traced without one: nothing stays on the CPU, and nothing waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.binary.surgery import binarize
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_latent_teacher, make_teacher
from tests.fake_cuda.fake_gpu import FakeGpu, fake_gpu, no_waits, on_gpu

PLANES = TINY.replace("binarize: {}", "binarize: {planes: 2}")
REFINED = TINY + "refine: {channels: 2, width: 4}\ndistill: {predict: v}\n"
LOG = "distill/trainer.py:_log"


def make_trainer(text, images, tmp_path, make=make_teacher, **train) -> Trainer:
    recipe = Recipe.parse(text).override("train", steps=400, **train)
    teacher = on_gpu(make())
    student = binarized_copy(teacher)
    binarize(student.unet, recipe, 1000)
    return Trainer(teacher, student, recipe, ImageData(teacher, images), tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8))
    return path


def train(trainer: Trainer, gpu: FakeGpu, steps: int = 2) -> None:
    """Steps as :meth:`Trainer.train` takes them: the second ends with a row of the log."""
    for step in range(steps):
        with no_waits(gpu):
            targets = trainer._targets(step)
            losses, norm = trainer._one_step(targets)
        trainer._log(losses, norm, None)
    assert gpu.waits[LOG] == 1 == len(trainer.rows)


CASES = {
    "spd, connections": (TINY, {}),
    "same noise": (TINY.replace("decoder[-8:]\"", 'decoder[-8:]", pair: same_noise'), {}),
    "mse": (TINY + "distill: {loss: mse}\n", {}),
    "noise as target": (TINY + "distill: {target: noise}\n", {}),
    "planes": (PLANES, {}),
    "refinement, v": (REFINED, {}),
    "bfloat16": (TINY, {"amp": "bfloat16"}),
    "float16": (TINY, {"amp": "float16"}),
    "auto": (TINY, {"amp": "auto"}),
    "no clipping": (TINY, {"clip": 0.0}),
    "progressive": (TINY, {"progressive": 0.5}),
    "sgd": (TINY, {"optimizer": "sgd"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_neither_mixes_devices_nor_waits(case, images, tmp_path):
    text, options = CASES[case]
    with fake_gpu() as gpu:
        trainer = make_trainer(text, images, tmp_path, **options)
        train(trainer, gpu)
        assert {p.device.type for p in trainer.student.unet.parameters()} == {"cuda"}
        assert {p.device.type for p in trainer.ema.module.parameters()} == {"cuda"}
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16, "auto": torch.bfloat16}
        assert case not in half or gpu.operations[half[case]]


def test_a_latent_model_encodes_on_the_gpu(images, tmp_path):
    with fake_gpu() as gpu:
        train(make_trainer(TINY, images, tmp_path, make_latent_teacher), gpu)


def test_the_whole_loop_waits_for_rows_of_the_log_alone(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "save", lambda trainer: None)
    with fake_gpu() as gpu:
        trainer = make_trainer(TINY, images, tmp_path)
        trainer.settings = trainer.recipe.override("train", steps=4).train
        trainer.train()
    assert set(gpu.waits) == {LOG} and gpu.waits[LOG] == len(trainer.rows)
