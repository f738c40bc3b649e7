"""Sampling and the trajectory error of the report on a GPU, traced without one.

Backend "torch": the kernels of "cupy" and CUDA graphs are no operations of torch (tests/kernels has them).
"""

from __future__ import annotations

import pytest

from bidm_cli.binary.surgery import binarize
from bidm_cli.distill.trainer import binarized_copy
from bidm_cli.distill.trajectory import trajectory_error
from bidm_cli.recipe import Recipe
from bidm_cli.registry import SAMPLERS
from bidm_cli.sampling.images import decode
from bidm_cli.sampling.sample import sample
from tests.fake_cuda.conftest import TINY, shallow


def make_student(teacher):
    student = binarized_copy(teacher)
    binarize(student.unet, Recipe.parse(TINY), 1000)
    return student


@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_sampling_waits_for_nothing(sampler, gpu):
    student = make_student(shallow().to("cuda"))
    with gpu.no_waits():
        x = sample(student, n=3, steps=2, sampler=sampler)
    assert x.device.type == "cuda"


def test_decoding_waits_once_per_image(gpu):
    model = shallow(latent=True).to("cuda")
    with gpu.no_waits():
        latents = sample(model, n=2, steps=2)
    gpu.waits.clear()
    images = decode(model, latents)
    assert images.shape == (2, 16, 16, 3) and dict(gpu.waits) == {"sampling/images.py:to_uint8": 2}


def test_the_trajectory_error_mixes_no_devices(gpu):
    teacher = shallow().to("cuda")
    student = make_student(teacher)
    gpu.waits.clear()
    assert trajectory_error(teacher, student, 2, 4)["steps"] == 4
    assert set(gpu.waits) <= {"distill/trajectory.py:trajectory_error"}
