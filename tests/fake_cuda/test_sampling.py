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
from tests.distill.conftest import TINY, make_latent_teacher, make_teacher
from tests.fake_cuda.fake_gpu import fake_gpu, no_waits, on_gpu


def make_student(teacher):
    student = binarized_copy(teacher)
    binarize(student.unet, Recipe.parse(TINY), 1000)
    return student


@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_sampling_waits_for_nothing(sampler):
    with fake_gpu() as gpu:
        student = make_student(on_gpu(make_teacher()))
        with no_waits(gpu):
            x = sample(student, n=3, steps=3, sampler=sampler)
        assert x.device.type == "cuda"


def test_decoding_waits_once_for_the_images():
    with fake_gpu() as gpu:
        model = on_gpu(make_latent_teacher())
        images = decode(model, sample(model, n=2, steps=2))
        assert images.shape == (2, 16, 16, 3) and dict(gpu.waits) == {"sampling/images.py:decode": 1}


def test_the_trajectory_error_mixes_no_devices():
    with fake_gpu() as gpu:
        teacher = on_gpu(make_teacher())
        assert trajectory_error(teacher, make_student(teacher), 2, 3)["steps"] == 3
        assert set(gpu.waits) <= {"distill/trajectory.py:trajectory_error"}
