"""Precision of attention's products on a CPU: what the file says, ``--precision``, and machines without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.packed.cpu.ops import attention as attention_module
from bidm_cli.packed.cpu.ops.attention import BfloatPlan, has_bfloat16
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.precision import precision_of, use_precision
from bidm_cli.recipe import Recipe
from tests.packed.recording.networks import LDM, packed

WIDE = {**LDM, "attention_resolutions": [1, 2], "num_classes": None}
"""With 256 tokens at the first level, enough for a matrix unit."""

needs_unit = pytest.mark.skipif(not has_bfloat16(), reason="needs a matrix unit")


@pytest.fixture
def model(tmp_path: Path) -> PackedModel:
    return packed(tmp_path, "ldm_unet", WIDE, (1, 16, 16), backend="numba")


def told(folder: Path, products: str) -> PackedModel:
    """The file with another entry in its recipe."""
    metadata, tensors = read_packed(folder / "m.bidm")
    metadata["recipe"]["attention"] = {"scores": "float", "products": products}
    write_packed(folder / "told.bidm", metadata, {name: t.clone() for name, t in tensors.items()})
    return load_packed(folder / "told.bidm", backend="numba")


def step(model: PackedModel) -> torch.Tensor:
    x = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    return model.denoise(x, torch.tensor([500, 20]))


def test_a_recipe_says_it() -> None:
    recipe = Recipe.load("w1a1")
    assert recipe.attention.products == "float32" and "attention" not in recipe.to_json()
    text = "name: x\nlayers:\n  - {role: '*', keep: float}\nattention: {products: bfloat16}\n"
    assert Recipe.parse(text, "x").to_json()["attention"] == {"scores": "float", "products": "bfloat16"}
    with pytest.raises(BidmError, match=r"line 4.*float16"):
        Recipe.parse(text.replace("bfloat16", "float16"), "x")


@needs_unit
def test_a_file_is_computed_as_it_says_unless_told_otherwise(model: PackedModel, tmp_path: Path) -> None:
    exact, lower = step(model), told(tmp_path, "bfloat16")
    assert precision_of(model) == ("float32", "") and precision_of(lower) == ("bfloat16", "")
    rounded = step(lower)
    assert not torch.equal(rounded, exact)
    use_precision(lower, "float32")
    assert torch.equal(step(lower), exact)
    use_precision(model, "bfloat16")
    assert torch.equal(step(model), rounded)


def test_without_a_matrix_unit_it_is_float32_and_says_so(
    model: PackedModel, tmp_path: Path, bidm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "has_bfloat16", lambda: False)
    told(tmp_path, "bfloat16")
    images = []
    for name in ("m", "told"):
        out = tmp_path / name
        called = bidm("sample", tmp_path / f"{name}.bidm", "-n", 1, "--steps", 2, "--raw", "--out", out)
        assert called.code == 0, called.err
        assert ("products are float32, not bfloat16" in called.err) == (name == "told")
        assert json.loads((out / "sample.json").read_text())["settings"]["precision"] is None
        images.append(np.load(out / "samples.npy"))
    assert np.array_equal(*images)


@needs_unit
def test_images_of_other_precision_do_not_mix(
    model: PackedModel, tmp_path: Path, bidm: Callable[..., Any]
) -> None:
    common = ("sample", tmp_path / "m.bidm", "-n", 1, "--steps", 2, "--out", tmp_path / "out")
    assert bidm(*common, "--precision", "bfloat16").code == 0
    settings = json.loads((tmp_path / "out" / "sample.json").read_text())["settings"]
    assert settings["precision"] == "bfloat16"
    refused = bidm(*common)
    assert refused.code == 1 and "made with precision bfloat16" in refused.err
    assert bidm(*common, "--precision", "float16").code == 1


@needs_unit
def test_kernels_of_the_precision_alone_are_compiled(model: PackedModel, tmp_path: Path) -> None:
    from bidm_cli.packed.cpu.ops.warm_up import kernels_for
    from bidm_cli.packed.layers import RunsOnBackend

    def named(model: PackedModel) -> set[str]:
        modules = [m for m in model.unet.modules() if isinstance(m, RunsOnBackend)]
        return {kernel.name for kernel in kernels_for(use for m in modules for use in m.uses())}

    lower = told(tmp_path, "bfloat16")
    assert f"amx_attend_{BfloatPlan.parts}" in named(lower) - named(model)


def test_nonsense_in_a_file_is_refused(model: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(BidmError, match="float8"):
        told(tmp_path, "float8")
