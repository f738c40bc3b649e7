"""``bidm inspect`` on checkpoints, packed files and bare configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bidm_cli.packed.format.container import network_bytes, read_packed
from tests.cli.running import DEMO, SHARED, Runner
from tests.report.models import lsun_bedrooms_config, packed_of, tiny
from tests.report.test_cost import COST_KEYS


@pytest.fixture
def bidm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.mark.parametrize(("recipe", "savings"), [("w1a1", (29.7, 55.0)), ("w1a2", (29.5, 28.8))])
def test_savings_of_the_recipes_on_lsun_bedrooms(
    bidm: Runner, tmp_path: Path, recipe: str, savings: tuple[float, float]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(lsun_bedrooms_config()))
    assert bidm("inspect", config, "--recipe", recipe, "--json", tmp_path / "i.json").status == 0
    found = json.loads((tmp_path / "i.json").read_text())
    storage, operations = found["cost"]["storage_ratio"], found["cost"]["ops_ratio"]
    assert savings[0] < storage < savings[0] + 0.2 and savings[1] < operations < savings[1] + 0.2
    assert found["connections"] == []


def test_a_bare_lsun_bedrooms_config_with_the_paper_s_recipe(bidm: Runner, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(lsun_bedrooms_config()))
    ran = bidm("inspect", config, "--recipe", "bidm", "--json", tmp_path / "i.json")
    assert ran.status == 0, ran.err
    for expected in ("family ldm", "274,056,163", "1045.4 MiB", "96.02 G", "101.20 G", "119 of 123 layers"):
        assert expected in ran.out, expected
    found = json.loads((tmp_path / "i.json").read_text())
    cost = found["cost"]
    assert list(cost) == COST_KEYS
    assert cost["parameters"] == found["parameters"] == 274_056_163
    assert cost["storage_ratio"] >= 29 and cost["ops_ratio"] >= 52.7
    assert round(cost["macs"] / 1e9, 2) == 96.02 and round(cost["macs_with_attention"] / 1e9, 2) == 101.2
    assert found["kind"] == "bare configuration" and found["has_weights"] is False
    assert found["first_stage"]["parameters"] == 55_322_782
    assert found["connections"] == [f"output_blocks.{i}" for i in range(4, 12)]
    assert found["schedule"]["kind"] == "scaled_linear" and found["schedule"]["timesteps"] == 1000
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == 123
    stem = layers["input_blocks.0.0"]
    assert (stem["role"], stem["kind"], stem["shape"], stem["rule"]) == ("stem", "float", [224, 3, 3, 3], 0)
    assert stem["macs"] == 224 * 27 * 64 * 64 and stem["packed_bytes"] == 2 * (224 * 27 + 224)
    skips = [layer for layer in layers.values() if layer["role"] == "skip"]
    assert all(layer["kind"] == "binary" and layer["spec"]["shortcut"] == "tile" for layer in skips)


def test_a_checkpoint(bidm: Runner, tmp_path: Path) -> None:
    ran = bidm("inspect", DEMO / "digits.pth", "--layers", "--json", tmp_path / "i.json")
    assert ran.status == 0, ran.err
    for expected in (
        "checkpoint, family ddpm",
        "evidence",
        "701,345 parameters",
        "EMA",
        "up.1.attn.0.proj_out",
    ):
        assert expected in ran.out, expected
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["cost"]["storage_ratio"] == found["cost"]["ops_ratio"] == 1.0
    assert found["ema"] is True and found["recipe"] is None and found["evidence"]


def test_layers_are_listed_only_when_asked_for(bidm: Runner) -> None:
    plain = bidm("inspect", DEMO / "digits.pth", "--recipe", "w1a1")
    assert "up.1.attn.0.proj_out" not in plain.out and "47 of 51 layers would be binary" in plain.out
    listed = bidm("inspect", DEMO / "digits.pth", "--recipe", "w1a1", "--layers")
    assert "w1a1 alpha K tau tile" in listed.out


def test_a_packed_file(bidm: Runner, tmp_path: Path) -> None:
    packed = packed_of(tiny(), tmp_path / "m.bidm")
    ran = bidm("inspect", tmp_path / "m.bidm", "--json", tmp_path / "i.json")
    assert ran.status == 0, ran.err
    assert "packed file, family ddpm" in ran.out and "layers are binary" in ran.out
    assert f"{packed.path.stat().st_size:,}" in ran.out
    found = json.loads((tmp_path / "i.json").read_text())
    assert (
        found["cost"]["packed_bytes"]
        == found["file_bytes"]["network"]
        == network_bytes(read_packed(packed.path)[1])
    )
    assert found["recipe"]["name"] == "bidm" and found["connections"]


@pytest.mark.parametrize("folder", ["ldm_unconditional_vq4", "ldm_class_conditional"])
def test_shared_ldm_checkpoints(bidm: Runner, folder: str) -> None:
    path = SHARED / "checkpoints" / folder / "model.ckpt"
    if not path.exists():
        pytest.skip("../shared is not here")
    ran = bidm("inspect", path, "--recipe", "w1a1")
    assert ran.status == 0 and "family ldm" in ran.out and "vq_first_stage" in ran.out, ran.err
    assert "would be binary" in ran.out


def test_errors_are_one_line(bidm: Runner, tmp_path: Path) -> None:
    assert "gone.ckpt" in bidm.fails("inspect", tmp_path / "gone.ckpt")
    assert "nothere" in bidm.fails("inspect", DEMO / "digits.pth", "--recipe", "nothere")
    typo = tmp_path / "typo.yaml"
    typo.write_text("name: x\nlayers:\n  - {role: conv, binarise: {}}\n")
    assert "line 3" in bidm.fails("inspect", DEMO / "digits.pth", "--recipe", typo)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text('name: x\nlayers:\n  - {name: "no.such.layer", binarize: {}}\n')
    assert "no.such.layer" in bidm.fails("inspect", DEMO / "digits.pth", "--recipe", wrong)
    (tmp_path / "file").write_text("")
    assert "cannot write" in bidm.fails(
        "inspect", DEMO / "digits.pth", "--json", tmp_path / "file" / "i.json"
    )
    assert bidm("inspect").status == 2
