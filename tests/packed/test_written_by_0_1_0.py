"""Files that bidm 0.1.0 wrote open, say and give what they did then.

Only the public interface is used: these files outlive any module's name. How they came about:
``written_by_0_1_0/write.py``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bidm_cli

FOLDER = Path(__file__).parent / "written_by_0_1_0"
RECORDED: dict[str, dict[str, Any]] = json.loads((FOLDER / "recorded.json").read_text())
pytestmark = pytest.mark.parametrize("name", RECORDED)


def _arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / f"{name}.npz") as saved:
        return {key: torch.from_numpy(saved[key]) for key in saved.files}


def test_says_what_it_said(name: str) -> None:
    packed, recorded = bidm_cli.load_packed(FOLDER / f"{name}.bidm", backend="torch"), RECORDED[name]
    assert packed.family == recorded["family"]
    assert packed.recipe == recorded["recipe"]
    assert packed.provenance == recorded["provenance"]
    assert list(packed.sample_shape) == recorded["sample_shape"]
    assert packed.schedule.timesteps == recorded["timesteps"]
    assert (packed.connections is not None) == recorded["connections"]
    table = json.dumps([record.to_json() for record in packed.layers], sort_keys=True)
    assert hashlib.sha256(table.encode()).hexdigest() == recorded["layers"]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_denoises_as_it_did(name: str, backend: str) -> None:
    """The inputs were chosen such that rounding decides no sign, so that floats differ by rounding alone."""
    packed, arrays = bidm_cli.load_packed(FOLDER / f"{name}.bidm", backend=backend), _arrays(name)
    with torch.no_grad():
        eps = packed.denoise(arrays["x"], arrays["t"], arrays.get("context"), arrays.get("y"))
    largest = arrays["eps"].abs().max()
    assert (eps - arrays["eps"]).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_samples_as_it_did(name: str, backend: str) -> None:
    """Mean difference within 1e-3 of the largest value.

    Where it was written the two backends agreed to 2e-5 in every value. On another machine convolutions round
    otherwise, and over four steps a sign near its threshold may flip: that moves some values by percents, but
    their mean by little. A wrong step, clip or threshold moves the mean by far more than this.
    """
    packed, arrays, recorded = (
        bidm_cli.load_packed(FOLDER / f"{name}.bidm", backend=backend),
        _arrays(name),
        RECORDED[name],
    )
    settings = {key: recorded[key] for key in ("seed", "labels", "guidance")}
    latents = bidm_cli.sample(packed, n=2, steps=4, **settings)
    assert (latents - arrays["latents"]).abs().mean() <= 1e-3 * arrays["latents"].abs().max()


def test_decodes_as_it_did(name: str) -> None:
    arrays = _arrays(name)
    if "images" not in arrays:
        pytest.skip("a model without a first stage")
    packed = bidm_cli.load_packed(FOLDER / f"{name}.bidm", backend="torch")
    images = packed.decode(arrays["latents"])
    # Where two codes are equally near, rounding may choose the other one for a few pixels.
    assert (images - arrays["images"]).abs().mean() <= 1e-3 * arrays["images"].abs().max()
