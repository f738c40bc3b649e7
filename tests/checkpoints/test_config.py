from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bidm_cli.checkpoints.detect import read_config, sibling_config
from bidm_cli.checkpoints.evidence import caveats
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import DDIM_CONFIG, DDPM_UNET, LDM_CONFIG, LDM_UNET


def _write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("values", "layout", "kind"),
    [
        (LDM_CONFIG, "ldm", "yaml"),
        (DDIM_CONFIG, "ddpm", "yaml"),
        (LDM_UNET, "ldm", "arguments"),
        ({"unet": LDM_UNET, "diffusion": {}}, "ldm", "arguments"),
        ({"unet": DDPM_UNET}, "ddpm", "arguments"),
        ({"unet": LDM_UNET, "library": "guided"}, "openai", "arguments"),
        ({"_class_name": "UNet2DModel"}, "diffusers", "json"),
        ({"model": {"params": {"ddconfig": {}}}}, "first stage", "yaml"),
        ({"name": "w1a1", "layers": []}, None, "arguments"),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_layouts(tmp_path: Path, values: Any, layout: str | None, kind: str, suffix: str) -> None:
    config = read_config(_write(tmp_path / f"c{suffix}", values))
    assert (config.layout, config.kind) == (layout, kind)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "just text", "a: [1", "{", "a: !!python/object:os.system {", "\x00"]
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_what_is_no_configuration(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_text(text)
    with pytest.raises(BidmError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_missing_and_huge_files(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00" * 10)
    with pytest.raises(BidmError):
        read_config(tmp_path / "c.yaml")
    with pytest.raises(BidmError, match="no such file"):
        read_config(tmp_path / "none.yaml")
    with open(tmp_path / "c.yaml", "wb") as handle:
        handle.truncate(1 << 30)
    with pytest.raises(BidmError, match="too large"):
        read_config(tmp_path / "c.yaml")


def test_values_are_checked_and_located() -> None:
    section = Section({"a": {"n": "1e-4", "list": [1, 2.5], "one": 3, "flag": 1, "null": None}}, "c.yaml")
    a = section.section("a")
    assert a.number("n") == 1e-4
    assert a.numbers("list") == [1, 2.5]
    assert a.numbers("one") == [3]
    assert a.flag("flag") is True
    assert a.integer("null", 5) == 5
    assert "null" not in a
    for read, name in (
        (a.integer, "n"),
        (a.number, "list"),
        (a.flag, "n"),
        (a.text, "one"),
        (a.section, "one"),
    ):
        with pytest.raises(BidmError, match=rf"c\.yaml: a: {name} must be"):
            read(name)
    with pytest.raises(BidmError, match=r"c\.yaml: a has no 'gone'"):
        a.integer("gone")


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "x", [], {}, "1e999", 10**400])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(BidmError, match="must be a number"):
        Section({"n": value}, "c").number("n")


def test_long_lists() -> None:
    with pytest.raises(BidmError, match="at most"):
        Section({"n": [1] * 10_000}, "c").numbers("n")


@pytest.mark.parametrize(
    "name",
    ["model.yaml", "model.yml", "model.json", "config.yaml", "config.yml", "project.yaml", "hparams.json"],
)
def test_siblings_are_found(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "model.ckpt"
    assert sibling_config(checkpoint, "ldm", []) is None
    _write(tmp_path / name, LDM_CONFIG)
    found = sibling_config(checkpoint, "ldm", [])
    assert found is not None
    assert found.path == tmp_path / name
    assert sibling_config(checkpoint, "ddpm", []) is None


def test_training_logs_and_precedence(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    project = _write(tmp_path / "configs" / "2022-01-01T00-00-00-project.yaml", LDM_CONFIG)
    assert sibling_config(checkpoint, "ldm", []).path == project  # type: ignore[union-attr]
    general = _write(tmp_path / "checkpoints" / "config.yaml", LDM_CONFIG)
    assert sibling_config(checkpoint, "ldm", []).path == general  # type: ignore[union-attr]
    own = _write(tmp_path / "checkpoints" / "last.yaml", LDM_CONFIG)
    assert sibling_config(checkpoint, "ldm", []).path == own  # type: ignore[union-attr]


def test_siblings_of_other_kinds_are_passed_over_aloud(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("layers: [")
    _write(tmp_path / "config.yaml", {"name": "a recipe"})
    right = _write(tmp_path / "config.yml", DDIM_CONFIG)
    notes: list[str] = []
    assert sibling_config(tmp_path / "model.ckpt", "ddpm", notes).path == right  # type: ignore[union-attr]
    assert [note.kind for note in caveats(notes)] == ["unreadable", "left out"]


@pytest.mark.parametrize("kind", ["bomb", "cycle"])
def test_references_that_unfold_without_end(tmp_path: Path, kind: str) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    text = "\n".join([*lines, "model_channels: *a11"]) if kind == "bomb" else "model_channels: &a [*a]"
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BidmError, match="unfold"):
        read_config(tmp_path / "x.yaml")
