"""Features that a file needs: listed by the writer, known by the reader or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from tests.packed.conftest import small_student

PLANES = Recipe.load("w1a1").to_yaml().replace("threshold: learnable", "threshold: learnable\n    planes: 2")


def packed(tmp_path: Path, recipe: str = PLANES, **distill: str) -> Path:
    source = tmp_path / "recipe.yaml"
    source.write_text(recipe)
    about = Recipe.load(source).override("distill", **distill)
    student = small_student(str(source))
    student.prediction = "v" if about.distill.predict == "v" else "epsilon"
    write_packed(tmp_path / "x.bidm", *pack_model(student, about.to_json()))
    return tmp_path / "x.bidm"


def test_planes_and_v_are_named_and_need_version_4(tmp_path: Path) -> None:
    metadata, tensors = read_packed(packed(tmp_path, predict="v"))
    assert metadata["requires"] == ["planes", "v"] and metadata["format_version"] == 4
    assert any(name.endswith(".plane_offset") for name in tensors)
    assert load_packed(tmp_path / "x.bidm").prediction == "v"


def test_a_file_without_them_stays_as_it_was(tmp_path: Path) -> None:
    recipe = Recipe.load("reference").to_yaml()
    metadata, _ = read_packed(packed(tmp_path, recipe))
    assert "requires" not in metadata and metadata["format_version"] == 1


@pytest.mark.parametrize(("names", "says"), [(["planes", "wings"], "needs wings"), ("planes", "no sense")])
def test_what_is_unknown_is_refused_by_name(tmp_path: Path, names: object, says: str) -> None:
    metadata, tensors = read_packed(packed(tmp_path))
    write_packed(tmp_path / "new.bidm", {**metadata, "requires": names}, tensors)
    with pytest.raises(BidmError, match=says) as error:
        read_packed(tmp_path / "new.bidm")
    assert "new.bidm" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("planes", [2, 3])
def test_packed_planes_are_the_student_s(tmp_path: Path, planes: int) -> None:
    recipe = PLANES.replace("planes: 2", f"planes: {planes}").replace("float: float16", "float: float32")
    path = packed(tmp_path, recipe)
    student = small_student(str(tmp_path / "recipe.yaml"))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 900])
    with torch.no_grad():
        expected = student.denoise(x, t)
    assert torch.equal(load_packed(path, backend="torch").denoise(x, t), expected)
