"""The fake GPU finds the faults it is there for: each is planted in a training step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.distill.objective import Objective
from tests.fake_cuda.fake_gpu import fake_gpu
from tests.fake_cuda.test_training import TINY, images, make_trainer, train  # noqa: F401


def _item(output):
    return output * output.mean().item()


def _truth(output):
    return output if bool(torch.isfinite(output).all()) else output


def _numpy(output):
    return output * float(np.mean(output.detach().numpy()))


def _to_cpu(output):
    return output * output.detach().cpu().mean()


def _left_on_the_cpu(output):
    return output * torch.ones(output.shape)


def _copied_without_pinning(output):
    return output * torch.ones(output.shape).to(output.device)


def _made_from_numbers(output):
    return output * torch.tensor([1.0], device=output.device)


def _indexed_by_a_mask(output):
    return output[output > 0]


def _synchronized(output):
    torch.cuda.synchronize()
    return output


@pytest.mark.parametrize(
    "fault",
    [
        _item, _truth, _numpy, _to_cpu, _left_on_the_cpu, _copied_without_pinning, _made_from_numbers,
        _indexed_by_a_mask, _synchronized,
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(fault, images, tmp_path, monkeypatch):  # noqa: F811
    denoise = Objective._denoise
    with fake_gpu() as gpu:
        trainer = make_trainer(TINY, images, tmp_path)
        monkeypatch.setattr(Objective, "_denoise", staticmethod(lambda *given: fault(denoise(*given))))
        with pytest.raises((AssertionError, RuntimeError)):
            train(trainer, gpu)
