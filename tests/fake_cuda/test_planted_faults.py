"""The fake GPU finds the faults it is there for: each is planted in a training step, and in sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.distill.objective import Objective
from bidm_cli.sampling.sample import sample
from bidm_cli.sampling.samplers.ddim import DDIM
from bidm_cli.transfer import to_device
from tests.fake_cuda.conftest import shallow
from tests.fake_cuda.fake_gpu import GpuWait

MIXED = (RuntimeError, r"two (different )?devices, cuda:0 and cpu|two different devices")


def waits(operation: str) -> tuple[type[Exception], str]:
    return GpuWait, rf"distill/objective\.py:_sampler_step waits for the GPU: {operation}"


FAULTS = {
    "item": (lambda out: out * out.mean().item(), *waits("aten._local_scalar_dense")),
    "a condition": (lambda out: out if (out == out).all() else -out, *waits("aten._local_scalar_dense")),
    "float": (lambda out: out * float(out.mean()), *waits("aten._local_scalar_dense")),
    "tolist": (lambda out: out * out.flatten().tolist()[0], *waits("aten._local_scalar_dense")),
    "equal": (lambda out: out if torch.equal(out, out) else -out, *waits("aten.equal")),
    "numpy": (lambda out: out * float(np.mean(out.detach().numpy())), RuntimeError, "numpy"),
    "to the CPU": (lambda out: out * out.detach().cpu().mean(), *waits("aten._to_copy")),
    "left on the CPU": (lambda out: out * torch.ones(out.shape), *MIXED),
    "not pinned": (lambda out: out * torch.ones(out.shape).to(out.device), *waits("aten._to_copy")),
    "pinned, but waited for": (
        lambda out: out * torch.ones(9).pin_memory().to(out.device)[0], *waits("aten._to_copy"),
    ),
    "from numbers": (lambda out: out * torch.tensor([1.0], device=out.device), *waits("aten")),
    "a mask as index": (lambda out: out[out > 0], *waits("aten.index")),
    "an index on the CPU": (lambda out: out[torch.tensor([0, 1])], *waits("aten.index")),
    "nonzero": (lambda out: out.nonzero(), *waits("aten.nonzero")),
    "synchronize": (lambda out: torch.cuda.synchronize() or out, *waits("synchronize")),
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(make_trainer):
    return make_trainer()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_a_training_step_is_found(fault, trainer, gpu, monkeypatch):
    plant, error, message = FAULTS[fault]
    denoise = Objective._denoise
    monkeypatch.setattr(Objective, "_denoise", staticmethod(lambda *given: plant(denoise(*given))))
    with gpu.no_waits(), pytest.raises(error, match=message):
        trainer.batches.targets(0)


def test_timesteps_read_back_from_the_gpu_are_found(trainer, gpu, monkeypatch):
    at = NoiseSchedule.at

    def on_gpu(schedule, t, like):
        return at(schedule, to_device(t, like.device), like)

    monkeypatch.setattr(NoiseSchedule, "at", on_gpu)
    with gpu.no_waits(), pytest.raises(GpuWait, match=r"diffusion/schedule\.py:at"):
        trainer.batches.targets(0)


def test_a_parameter_left_on_the_cpu_is_found(make_trainer, gpu):
    trainer = make_trainer()
    norm = next(m for m in trainer.student.unet.modules() if isinstance(m, torch.nn.GroupNorm))
    norm._parameters["weight"] = torch.nn.Parameter(torch.ones(norm.num_channels))
    with gpu.no_waits(), pytest.raises(MIXED[0], match=MIXED[1]):
        trainer._one_step(lambda: trainer.batches.targets(0))


def test_a_wait_in_the_average_is_found(trainer, gpu, monkeypatch):
    with gpu.no_waits():
        targets = trainer.batches.targets(0)
    monkeypatch.setattr(trainer.ema, "update", lambda network, step: next(network.parameters()).sum().item())
    with gpu.no_waits(), pytest.raises(GpuWait, match=r"distill/trainer\.py:_one_step"):
        trainer._one_step(lambda: targets)


def test_a_wait_in_a_sampler_is_found(gpu, monkeypatch):
    advance = DDIM.advance

    def waiting(self, index, x, found, draw):
        return advance(self, index, x / x.abs().max().item(), found, draw)

    model = shallow().to("cuda")
    monkeypatch.setattr(DDIM, "advance", waiting)
    with gpu.no_waits(), pytest.raises(GpuWait, match=r"sampling/sample\.py:run"):
        sample(model, n=2, steps=2, sampler="ddim")
