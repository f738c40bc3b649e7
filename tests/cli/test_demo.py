"""``bidm demo``: the bundled checkpoint is what it says it is."""

from __future__ import annotations

import numpy as np
import torch

from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.sample import sample


def test_writes_a_checkpoint_that_loads_and_fits_the_limit(bidm, tmp_path):
    called = bidm("demo", tmp_path / "demo")
    assert called.code == 0 and "bidm compress" in called.out
    file = tmp_path / "demo" / "digits.pth"
    assert file.stat().st_size <= 5_000_000
    checkpoint = load_checkpoint(file)
    assert checkpoint.family == "ddpm" and checkpoint.sample_shape == (1, 8, 8)
    assert Recipe.load(tmp_path / "demo" / "digits-w1a1.yaml").name == "w1a1"


def test_is_in_the_layout_of_ermongroup(bidm, tmp_path):
    bidm("demo", tmp_path / "demo")
    states = torch.load(tmp_path / "demo" / "digits.pth", weights_only=True)
    assert isinstance(states, list) and len(states) == 5
    assert all(name.startswith("module.") for name in states[0])
    assert set(states[-1]) == {name.removeprefix("module.") for name in states[0]}


def test_its_samples_look_like_the_digits_it_was_trained_on(bidm, tmp_path):
    """In the distance to the nearest training image, samples are as close as digits are to each other."""
    bidm("demo", tmp_path / "demo")
    pixels = np.load(tmp_path / "demo" / "digits.npz")["images"].astype(np.float32).reshape(-1, 64)
    drawn = sample(load_checkpoint(tmp_path / "demo" / "digits.pth"), n=32, steps=25, clip=True)
    drawn = ((drawn.clamp(-1, 1) + 1) * 127.5).reshape(-1, 64).numpy()

    def nearest(a: np.ndarray, b: np.ndarray, skip: int) -> float:
        distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))
        return float(np.sort(distances, axis=1)[:, skip].mean())

    among_digits = nearest(pixels[:200], pixels, skip=1)
    noise = np.random.default_rng(0).uniform(0, 255, (32, 64)).astype(np.float32)
    assert nearest(drawn, pixels, skip=0) < 1.5 * among_digits
    assert nearest(noise, pixels, skip=0) > 2.5 * among_digits


def test_again_is_fine_and_other_files_are_never_overwritten(bidm, tmp_path):
    assert bidm("demo", tmp_path).code == 0
    assert bidm("demo", tmp_path).code == 0
    (tmp_path / "digits.yml").write_text("mine")
    called = bidm("demo", tmp_path)
    assert called.code == 1 and "digits.yml exists" in called.err
    assert (tmp_path / "digits.yml").read_text() == "mine"
