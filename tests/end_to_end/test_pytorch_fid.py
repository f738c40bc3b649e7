"""``bidm report`` beside pytorch-fid's own command: the same files in, the same number out.

Inception's weights are generated in the layout of pytorch-fid's file and lie where its command looks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.report.test_metrics import inception_file, write_images

__all__ = ["inception_file"]
ROOT = Path(__file__).resolve().parents[2]
DIMS, STRENGTH = 2048, 0.5


@pytest.fixture
def home(tmp_path: Path, inception_file: Path) -> Path:
    """TORCH_HOME with the generated weights under the published ones' name."""
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "pt_inception-2015-12-05-6726825d.pth").symlink_to(inception_file)
    return tmp_path / "torch"


def run(home: Path, *command: object) -> str:
    more = {"TORCH_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    said = [sys.executable, "-W", "ignore", *map(str, command)]
    done = subprocess.run(said, capture_output=True, text=True, env={**os.environ, **more}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def fid(home: Path, samples: Path, reference: Path) -> float:
    """By pytorch-fid's command."""
    out = run(home, "-m", "pytorch_fid", samples, reference, "--device", "cpu", "--num-workers", 0)
    return float(re.findall(r"FID: +(\S+)", out)[0])


def own(home: Path, samples: Path, reference: Path, *more: object) -> float:
    """By bidm's command."""
    bidm = "from bidm_cli.cli.main import main; main()"
    asked = ("--reference", reference, "--samples", samples, "--features", "inception", "--device", "cpu")
    target = home / "report.json"
    run(home, "-c", bidm, "report", *asked, "--json", target, *more)
    (score,) = json.loads(target.read_text())["metrics"]
    return score["value"]


def write_statistics(path: Path, seed: int) -> Path:
    """Mean and covariance of full rank, from more features than there are dimensions."""
    rng = np.random.default_rng(seed)
    features = rng.random((DIMS + 500, DIMS), np.float32).astype(np.float64)
    features *= 0.1 + STRENGTH * rng.random(DIMS)
    np.savez(path, mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    return path


@pytest.mark.slow
def test_folders_of_images(home: Path, tmp_path: Path) -> None:
    """The statistics to 1e-6 of the largest entry, and the distance.

    Of fewer images than features pytorch-fid takes the root of a singular matrix, whose last digits are
    rounding noise; statistics of full rank are below.
    """
    a, b = (write_images(tmp_path / name, 12, seed, size=32) for seed, name in enumerate("ab"))
    found = own(home, a, b, "--save-stats", tmp_path / "own.npz")
    assert found == pytest.approx(fid(home, a, b), rel=1e-5)
    shared = ("--device", "cpu", "--num-workers", 0)
    run(home, "-m", "pytorch_fid", "--save-stats", b, tmp_path / "theirs.npz", *shared)
    mine, theirs = (np.load(tmp_path / f"{name}.npz") for name in ("own", "theirs"))
    for key in ("mu", "sigma"):
        np.testing.assert_allclose(mine[key], theirs[key], rtol=0, atol=1e-6 * abs(theirs[key]).max())
    assert found > 0.1


@pytest.mark.slow
def test_saved_statistics(home: Path, tmp_path: Path) -> None:
    a, b = (write_statistics(tmp_path / f"{name}.npz", seed) for seed, name in enumerate("ab"))
    expected = fid(home, a, b)
    assert own(home, a, b) == pytest.approx(expected, abs=1e-6, rel=1e-6) and expected > 0.1
    assert torch.load(
        home / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth", weights_only=True
    )
