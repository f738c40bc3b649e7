"""The seed alone decides the bytes: another process has another state of torch's global generator."""

from __future__ import annotations

import torch

from bidm_cli.distill.compress import compress
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, images, make_teacher  # noqa: F401

REFINED = TINY + "refine: {channels: 2, width: 4}\n"


def test_new_layers_are_initialized_by_the_seed(images, tmp_path):  # noqa: F811
    def packed(state: int, seed: int) -> bytes:
        teacher, out = make_teacher(), tmp_path / f"{state}-{seed}.bidm"
        torch.manual_seed(state)
        options = {"data": images, "steps": 1, "trajectory_points": 0, "run_dir": out.with_suffix("")}
        compress(teacher, Recipe.parse(REFINED), out, seed=seed, **options)
        return out.read_bytes()

    assert packed(1, 0) == packed(2, 0) != packed(3, 1)


def test_the_caller_s_generator_is_left_as_it_was(images, tmp_path):  # noqa: F811
    teacher = make_teacher()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    compress(teacher, Recipe.parse(REFINED), tmp_path / "x.bidm", data=images, steps=0, trajectory_points=0,
             run_dir=tmp_path / "run")  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
