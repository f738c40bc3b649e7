"""A training step on a GPU, traced without one: nothing stays on the CPU, and nothing waits.

The optimizer is AdamW throughout: torch's fused SGD has no kernel for fake tensors.
"""

from __future__ import annotations

import pytest
import torch

from bidm_cli.distill.trainer import Trainer
from tests.fake_cuda.conftest import TINY, shallow

LOG = {"distill/loss_watch.py:_finite", "distill/loss_watch.py:take_means"}
PLANES = TINY.replace("binarize: {}", "binarize: {planes: 2}")
SAME_NOISE = PLANES.replace('decoder[-8:]"', 'decoder[-8:]", pair: same_noise')
INDEPENDENT = TINY.replace('decoder[-8:]"', 'decoder[-8:]", pair: independent')
REFINED = INDEPENDENT + "refine: {channels: 2, width: 4}\ndistill: {predict: v}\n"
CASES = {
    "SPD, connections, clipping, EMA": (TINY, {}, None),
    "bfloat16, planes, features by mse": (
        SAME_NOISE + "distill: {loss: mse}\n", {"amp": "bfloat16"}, "bfloat16",
    ),
    "float16, refinement, v": (REFINED, {"amp": "float16"}, "float16"),
    "auto, noise as target, no clipping": (
        TINY + "distill: {target: noise}\n", {"amp": "auto", "clip": 0.0}, "bfloat16",
    ),
    "progressive, low noise more often": (TINY, {"progressive": 0.5, "timestep_power": 3.0}, None),
}  # fmt: skip


def step(trainer: Trainer, gpu) -> None:
    with gpu.no_waits():
        trainer._one_step(lambda: trainer.batches.targets(trainer.step))
        trainer._log(None)


@pytest.mark.parametrize("case", CASES)
def test_a_step_neither_mixes_devices_nor_waits(case, make_trainer, gpu):
    text, options, half = CASES[case]
    trainer = make_trainer(text, **options)
    step(trainer, gpu)
    for network in (trainer.student.unet, trainer.ema.module):
        assert {p.device.type for p in network.parameters()} == {"cuda"}
    assert half is None or gpu.operations[getattr(torch, half)]


def test_a_latent_model_encodes_on_the_gpu(make_trainer, gpu):
    teacher = shallow(latent=True)
    step(make_trainer(teacher=teacher), gpu)
    assert {p.device.type for p in teacher.first_stage.parameters()} == {"cuda"}


def test_the_whole_loop_waits_for_rows_of_the_log_alone(make_trainer, gpu, monkeypatch):
    monkeypatch.setattr(Trainer, "save", lambda trainer: None)
    trainer = make_trainer()
    trainer.step = 397
    gpu.waits.clear()
    trainer.train()
    assert set(gpu.waits) == LOG and [row.step for row in trainer.rows] == [398, 400]


def test_with_skip_nan_the_losses_alone_are_waited_for(make_trainer, gpu):
    trainer = make_trainer()
    trainer.watch.skip_nan = 1
    targets = trainer.batches.targets(0)
    gpu.waits.clear()
    trainer._one_step(lambda: targets)
    assert set(gpu.waits) == {"distill/loss_watch.py:_finite"}
