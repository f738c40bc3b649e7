"""``bidm demo``: the bundled checkpoints and packed models are what it says they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bidm_cli
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.files import sha256_of
from bidm_cli.packed.format.read import load_packed
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


def test_nothing_is_written_beside_a_file_in_the_way(bidm, tmp_path):
    (tmp_path / "digits-w1a2.yaml").mkdir()
    called = bidm("demo", tmp_path)
    assert called.code == 1 and "digits-w1a2.yaml exists" in called.err
    assert [path.name for path in tmp_path.iterdir()] == ["digits-w1a2.yaml"]


@pytest.fixture(scope="module")
def faces() -> Path:
    """Folder of the bundled faces."""
    return Path(bidm_cli.__file__).parent / "demo"


def test_the_faces_are_a_latent_model_in_compvis_layout(faces: Path) -> None:
    file = faces / "ldm4_peeps.ckpt"
    assert file.stat().st_size <= 15_000_000
    names = torch.load(file, weights_only=True)["state_dict"]
    assert not any(name.startswith("model_ema.") for name in names)
    checkpoint = load_checkpoint(file)
    assert checkpoint.family == "ldm" and checkpoint.sample_shape == (3, 8, 8)
    assert any("config.yaml" in line for line in checkpoint.evidence)
    images = np.load(faces / "faces.npz")["images"]
    assert images.shape == (4000, 32, 32, 3) and images.dtype == np.uint8
    pixels = torch.from_numpy(images[:8]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        decoded = checkpoint.decode(checkpoint.encode(pixels))
    assert float((decoded - pixels).square().mean()) < 4 / 10**3  # 30 dB


@pytest.mark.parametrize("name", ["faces-w1a1", "faces-w1a2"])
def test_the_packed_faces_are_the_original_s(faces: Path, name: str) -> None:
    """From the same seeds a packed model draws the original's people, not others."""
    packed, original = load_packed(faces / f"{name}.bidm"), load_checkpoint(faces / "ldm4_peeps.ckpt")
    assert packed.provenance["sha256"] == sha256_of(faces / "ldm4_peeps.ckpt")
    assert (faces / f"{name}.bidm").stat().st_size < 7_000_000
    with torch.no_grad():
        latents = [sample(one, n=8, steps=10, sampler="dpm++") for one in (packed, original)]
        drawn, expected = (one.decode(z) for one, z in zip((packed, original), latents, strict=True))
    distance = (drawn[:, None] - expected[None]).square().mean(dim=(2, 3, 4))
    own, others = distance.diagonal(), distance[~torch.eye(8, dtype=torch.bool)]
    assert float(own.mean()) < 0.6 * float(others.mean())
