"""The loop: it learns, it logs, and an interrupted run ends in the same bits."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.surgery import binarize
from bidm_cli.distill import trainer as trainer_module
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.optimizer import amp_dtype, create_optimizer, create_scheduler
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_teacher


def make_trainer(images, run_dir, steps=4, seed=0, **kwargs) -> Trainer:
    recipe = Recipe.parse(TINY).override("train", steps=steps, **kwargs.pop("train", {}))
    teacher = make_teacher()
    student = binarized_copy(teacher)
    binarize(student.unet, recipe, 1000)
    return Trainer(teacher, student, recipe, ImageData(teacher, images), run_dir, seed, **kwargs)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.ema.module.state_dict()


class Killed(Exception):
    pass


@pytest.mark.parametrize("progressive", [0.0, 0.9])
def test_a_killed_run_resumes_to_the_same_bits(images, tmp_path, monkeypatch, progressive):
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_SECONDS", 0.0)
    gradual = {"progressive": progressive}
    whole = make_trainer(images, tmp_path / "whole", steps=6, train=gradual)
    whole.train()

    def kill(row):
        if broken.step == 4:
            raise Killed

    broken = make_trainer(
        images, tmp_path / "broken", steps=6, train=gradual, reporter=Reporter(advance=kill)
    )
    with pytest.raises(Killed):
        broken.train()
    resumed = make_trainer(images, tmp_path / "broken", steps=6, train=gradual)
    assert resumed.resume() and resumed.step == 3
    resumed.train()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_activations_become_binary_by_the_step_and_the_average_is_binary_throughout(images, tmp_path):
    shares = []

    def note(row):
        share = {m.binary_share for m in trainer.student.unet.modules() if isinstance(m, BinaryLayer)}
        averaged = {m.binary_share for m in trainer.ema.module.modules() if isinstance(m, BinaryLayer)}
        assert averaged == {1.0}
        shares.extend(share)

    trainer = make_trainer(
        images, tmp_path, steps=8, train={"progressive": 0.5}, reporter=Reporter(advance=note)
    )
    trainer.train()
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_the_teacher_and_its_first_stage_do_not_change(images, tmp_path):
    trainer = make_trainer(images, tmp_path)
    before = {k: v.clone() for k, v in trainer.objective.teacher.unet.state_dict().items()}
    trainer.train()
    after = trainer.objective.teacher.unet.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_every_parameter_of_the_student_moves_and_the_loss_falls(images, tmp_path):
    trainer = make_trainer(images, tmp_path, steps=30, train={"batch_size": 8, "lr": 3e-3, "lr_binary": 3e-3})
    before = {k: v.clone() for k, v in trainer.student.unet.named_parameters()}
    trainer.train()
    stuck = [k for k, v in trainer.student.unet.named_parameters() if torch.equal(v, before[k])]
    assert stuck == []
    losses = [row.noise_loss for row in trainer.rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_betas_stay_within_the_recipe_s_limit(images, tmp_path):
    trainer = make_trainer(images, tmp_path, steps=3, train={"lr": 5.0})
    with torch.no_grad():
        trainer.student.unet.connections.beta.fill_(0.4)
    trainer.train()
    beta = trainer.student.unet.connections.beta
    assert beta.min() >= 0 and beta.max() <= 0.5 and beta.min() != beta.max()


def test_the_log_has_every_row_and_tensorboard_gets_it(images, tmp_path):
    trainer = make_trainer(images, tmp_path, steps=3)
    trainer.train()
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert float(rows[-1]["loss"]) == pytest.approx(trainer.rows[-1].loss)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_without_tensorboard_the_log_is_the_same(images, tmp_path, monkeypatch):
    make_trainer(images, tmp_path / "with", steps=3).train()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    make_trainer(images, tmp_path / "without", steps=3).train()
    logs = [(tmp_path / name / "log.csv").read_bytes() for name in ("with", "without")]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "without").glob("events.out.tfevents.*"))


def test_another_recipe_or_seed_does_not_resume(images, tmp_path):
    make_trainer(images, tmp_path, steps=2).train()
    with pytest.raises(BidmError, match=r"train\.steps"):
        make_trainer(images, tmp_path, steps=3).resume()
    with pytest.raises(BidmError, match="seed"):
        make_trainer(images, tmp_path, steps=2, seed=5).resume()


def test_a_damaged_checkpoint_says_so(images, tmp_path):
    trainer = make_trainer(images, tmp_path, steps=2)
    trainer.train()
    trainer.checkpoint.write_bytes(trainer.checkpoint.read_bytes()[:1000])
    with pytest.raises(BidmError, match=r"checkpoint\.pt cannot be read"):
        make_trainer(images, tmp_path, steps=2).resume()


def test_a_diverging_run_stops_with_advice(images, tmp_path):
    trainer = make_trainer(images, tmp_path, steps=3)
    with torch.no_grad():
        trainer.student.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(BidmError, match="no longer finite"):
        trainer.train()


def test_latent_binary_weights_have_their_own_rate(images, tmp_path):
    trainer = make_trainer(images, tmp_path)
    settings = Recipe.parse(TINY).override("train", lr=0.1, lr_binary=0.7).train
    optimizer = create_optimizer(trainer.student.unet, settings)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    latent = {id(m.weight) for m in trainer.student.unet.modules() if isinstance(m, BinaryLayer)}
    assert {rates[i] for i in latent} == {0.7}
    assert {rate for i, rate in rates.items() if i not in latent} == {0.1}


def test_an_unknown_optimizer_is_named(images, tmp_path):
    with pytest.raises(BidmError, match="adamx"):
        make_trainer(images, tmp_path, train={"optimizer": "adamx"})


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("cosine", 0.505)])
def test_schedules_warm_up_and_then_stay_or_fall(schedule, middle):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = Recipe.parse(TINY).override("train", steps=110, warmup=10, schedule=schedule, lr=1.0).train
    scheduler = create_scheduler(optimizer, settings)
    rates = []
    for step in range(1, 111):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] < 0.2 and rates[9] == pytest.approx(1.0, rel=0.05)
    assert rates[59] == pytest.approx(middle, rel=0.05)


def test_amp_is_off_on_a_cpu_unless_asked_for():
    assert amp_dtype("auto", torch.device("cpu")) is None
    assert amp_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16


def test_training_in_bfloat16_stays_finite(images, tmp_path):
    trainer = make_trainer(images, tmp_path, steps=2, train={"amp": "bfloat16"})
    trainer.train()
    assert all(torch.isfinite(v).all() for v in weights(trainer).values())
