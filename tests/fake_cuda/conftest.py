"""A training step of a network as small as they get, on a fake GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.networks.registry import build
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_latent_teacher, make_teacher
from tests.fake_cuda.fake_gpu import FakeGpu, fake_gpu

__all__ = ["TINY", "shallow"]


def shallow(latent: bool = False) -> DiffusionModel:
    """A teacher with one level, 1x8x8: every operation on a fake tensor takes a millisecond."""
    model = make_latent_teacher() if latent else make_teacher()
    unet = model.architecture["unet"]
    model.unet = build({**unet, "args": {**unet["args"], "ch_mult": [1], "attention_levels": [0]}})
    return model


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def make_trainer(gpu, tmp_path_factory) -> Callable[..., Trainer]:
    """``make_trainer(recipe text, teacher, **train)``: a trainer that logs every second step."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels)

    def make(text=TINY, teacher=None, **train) -> Trainer:
        recipe = Recipe.parse(text).override("train", steps=400, **train)
        teacher = (teacher or shallow()).to("cuda")
        student = binarized_copy(teacher)
        binarize(student.unet, recipe, 1000)
        return Trainer(teacher, student, recipe, ImageData(teacher, folder / "images.npz"), folder / "run")

    return make
