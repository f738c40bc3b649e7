"""``bidm bench`` on packed files, checkpoints and bare configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import DEMO, Runner
from tests.report.models import packed_of, tiny

QUICK = ("--rounds", "1", "--backend", "torch")


@pytest.fixture
def bidm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def test_a_packed_file(bidm: Runner, tmp_path: Path) -> None:
    packed_of(tiny(), tmp_path / "m.bidm")
    ran = bidm("bench", tmp_path / "m.bidm", *QUICK, "--steps", "2", "--json", tmp_path / "b.json")
    assert ran.status == 0, ran.err
    for expected in (
        "one step, batch 1",
        "sampling, 2 steps",
        "peak memory",
        "all binary layers",
        "random weights",
    ):
        assert expected in ran.out, expected
    found = json.loads((tmp_path / "b.json").read_text())
    for entry in (found["step"], found["sampling"], found["layers"][0]):
        assert entry["ratio"] == pytest.approx(entry["float_seconds"] / entry["packed_seconds"])
    assert len(found["attention"]) == 4 and "Attention's 4 products (float)" in ran.out
    assert {entry["role"] for entry in found["attention"]} == {"attention"}
    *kinds, whole = found["kinds"]
    assert whole["role"] == "all binary layers" and whole["layers"] == len(found["layers"])
    for key, entries in (("float_seconds", kinds), ("packed_seconds", found["layers"])):
        assert whole[key] == pytest.approx(sum(entry[key] for entry in entries))
    assert found["memory"]["float_bytes"] > 0 and found["memory"]["packed_bytes"] > 0
    slower = found["step"]["ratio"] < 1 or found["sampling"]["ratio"] < 1
    assert ("SLOWER" in ran.out) == slower, "a slower network is called slower"


def test_a_bare_configuration_with_a_recipe(bidm: Runner, tmp_path: Path) -> None:
    options = ("--recipe", "xnor", "--batch-size", "2", "--steps", "0", "--no-layers", "--no-memory")
    ran = bidm("bench", DEMO / "digits.yml", *QUICK, *options, "--json", tmp_path / "b.json")
    assert ran.status == 0, ran.err
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["batch_size"] == 2 and found["layers"] == [] and found["sampling"] is found["memory"] is None
    assert found["machine"]["float_weights"] == "random weights"


def test_a_teacher_is_used_where_given(bidm: Runner, tmp_path: Path) -> None:
    options = ("--steps", "0", "--no-layers", "--no-memory", "--teacher", DEMO / "digits.pth")
    packed_of(tiny(), tmp_path / "m.bidm")
    assert "the teacher" in bidm("bench", tmp_path / "m.bidm", *QUICK, *options).out


def test_errors_are_one_line(bidm: Runner, tmp_path: Path) -> None:
    assert "give --recipe" in bidm.fails("bench", DEMO / "digits.pth")
    assert "gone.bidm" in bidm.fails("bench", tmp_path / "gone.bidm")
    assert bidm("bench", DEMO / "digits.pth", "--batch-size", "0").status == 2
