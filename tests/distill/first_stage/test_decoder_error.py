"""The error of a packed first stage: measured at the end of a compression, said, and kept in the file."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from bidm_cli.cli.compress import _first_stage_line
from bidm_cli.distill.compress import compress
from bidm_cli.distill.first_stage.decoder_error import picture_errors
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.read import load_packed
from bidm_cli.recipe import Recipe
from bidm_cli.report.inspection import first_stage_text
from tests.distill.conftest import TINY
from tests.packed.format.test_first_stage import latent_model

FORMS = {
    "": ("decoder alone, int8", 35),
    "first_stage: {weights: int6}\n": ("decoder alone, int6", 25),
    "first_stage: {keep: both, weights: float16}\n": ("encoder and decoder, float16", 45),
}


@pytest.mark.parametrize("section", FORMS)
def test_compress_says_and_keeps_it(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = latent_model()
    teacher.unet = build(teacher.architecture["unet"])
    recipe = Recipe.parse(TINY.replace("steps: 4", "steps: 1") + section + "distill: {loss: none}\n")
    torch.manual_seed(0)
    np.save("latents.npy", torch.randn(6, 4, 8, 8).numpy())
    result = compress(copy.copy(teacher), recipe, "x.bidm", data="latents.npy", trajectory_points=0)
    form, least = FORMS[section]
    assert result.first_stage["n"] == 6 and result.first_stage["psnr"] > least
    line = _first_stage_line(result.first_stage)
    assert line.startswith(f"first stage: {form}") and "dB PSNR" in line and "\n" not in line
    assert ("weights, error" in line) == ("int" in form)
    opened = load_packed("x.bidm", backend="torch")
    assert opened.training["first_stage"] == {key: result.first_stage[key] for key in ("psnr", "ssim", "n")}
    assert f"{result.first_stage['psnr']:g} dB" in first_stage_text(opened)
    written = json.loads((result.run_dir / "result.json").read_text())
    assert written["first_stage"]["psnr"] == result.first_stage["psnr"]


def test_errors_of_known_differences():
    images = [torch.rand(1, 1, 12, 12) - 0.5 for _ in range(3)]
    found = picture_errors((image, image + 0.01) for image in images)
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / 1e-4), abs=0.01) and found["n"] == 3
    assert 0.99 < found["ssim"] < 1
    assert picture_errors((image, image) for image in images) == {"psnr": None, "ssim": 1.0, "n": 3}
