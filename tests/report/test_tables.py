"""Numbers for people and aligned tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.bench.result import BenchResult
from bidm_cli.report.cost.cost import cost
from bidm_cli.report.drawing import DrawnSet, common_settings
from bidm_cli.report.pages.models_table import models_table
from bidm_cli.report.pages.summary import ModelReport, Report
from bidm_cli.report.pages.tables import (
    Table,
    breakdown_table,
    bytes_text,
    count_text,
    layer_table,
    ratio_text,
    role_table,
    savings_table,
    seconds_text,
    spec_text,
)
from bidm_cli.sampling.options import SamplingOptions
from tests.report.models import packed_of, student_of, tiny
from tests.report.test_timing import result_of


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (9_999, "9,999 B"),
        (10_240, "10.0 KiB"),
        (2_000 * 1024, "2.0 MiB"),
        (1_096_224_652, "1045.4 MiB"),
        (36_881_578, "35.2 MiB"),
        (5 * 2**30, "5.0 GiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999"),
        (1000, "1.0 K"),
        (999_960, "1.0 M"),
        (96_017_969_152, "96.02 G"),
        (1_755_632_896.0, "1.76 G"),
        (3.2e12, "3.20 T"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text


def test_ratios_and_seconds() -> None:
    assert [ratio_text(r) for r in (54.69, 9.996, 0.32)] == ["54.7x", "10.00x", "0.32x"]
    assert [seconds_text(s) for s in (1.23e-5, 4.5678e-3, 1.5, 740)] == [
        "12.3 us",
        "4.57 ms",
        "1.5 s",
        "740 s",
    ]


def test_columns_line_up_and_sums_are_ruled_off() -> None:
    rows = [("a", "1"), ("long name", "12,345"), ("total", "9")]
    lines = Table("T", ["name", "number"], rows, totals=1, note="N").to_text().splitlines()
    assert lines == [
        "T",
        "-----------------",
        "name       number",
        "-----------------",
        "a               1",
        "long name  12,345",
        "-----------------",
        "total           9",
        "N",
    ]


def test_parts_of_a_binary_layer_in_the_papers_letters() -> None:
    assert spec_text(BinarySpec()) == "w1a1 alpha K tau tile"
    xnor = BinarySpec(activation_scale="fixed", threshold="none", shortcut="none", weight_scale="layer")
    assert spec_text(xnor) == "w1a1 alpha(layer) K(fixed)"
    assert spec_text(BinarySpec(activations="float", shortcut="none")) == "w1a32 alpha"


def test_tables_of_a_cost(tiny_model: DiffusionModel) -> None:
    found = cost(tiny_model, "bidm")
    layers = layer_table(found)
    assert len(layers.rows) == len(found.layers) + len(found.others) + len(found.attention) + 1
    roles = role_table(found)
    assert list(layers.rows[-1][5:]) == list(roles.rows[-1][3:]), "the same sums"
    assert sum(int(row[2]) for row in roles.rows[:-1]) == int(roles.rows[-1][2])
    by_name = {row[0]: row for row in layers.rows}
    assert by_name["conv_in"][2] == "float"
    assert by_name["down.0.block.0.conv1"][2:5] == ("w1a1 alpha K tau tile", "32x32x3x3", "32x8x8")
    assert savings_table(found).rows[0][3] == ratio_text(found.storage_ratio)
    assert savings_table(found).rows[2][3] == ratio_text(found.ops_ratio_with_attention)
    assert breakdown_table(found).rows[-1][1] == count_text(found.ops_with_attention)


def test_a_float_network_has_no_packed_columns(tiny_model: DiffusionModel) -> None:
    assert list(layer_table(cost(tiny_model)).columns)[-2:] == ["MACs", "float32"]


def reports(model: DiffusionModel) -> Report:
    """A packed model and its original, without any measurement."""
    packed = ModelReport(Path("p.bidm"), "ddpm", cost(model, "bidm"), 1000)
    return Report([packed, ModelReport(Path("o.pth"), "ddpm", cost(model), 9000)])


def rows_of(report: Report) -> list[dict[str, str]]:
    table = models_table(report)
    assert table is not None
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_models_side_by_side(tiny_model: DiffusionModel) -> None:
    report = reports(tiny_model)
    assert models_table(replace(report, models=report.models[:1])) is None
    packed, original = rows_of(report)
    assert list(packed) == ["model", "network", "whole file", "operations"], "nothing was measured"
    assert packed["operations"] == count_text(report.models[0].cost.ops) != original["operations"]
    report.models[0].trajectory, report.models[0].first_stage = {"mean": 0.25}, {"psnr": 51.25, "n": 4}
    packed, original = rows_of(report)
    assert (packed["trajectory error"], original["trajectory error"]) == ("0.25000", "-")
    assert (packed["decoder PSNR"], original["decoder PSNR"]) == ("51.2 dB", "-")


def with_decoding(result: BenchResult) -> BenchResult:
    return replace(result, decoding=result.step, picture_steps=20)


def test_times_of_the_table_are_a_benchmarks_for_both_sides(tiny_model: DiffusionModel) -> None:
    report = reports(tiny_model)
    report.drawn = {model.path: DrawnSet(Path("x"), 7.0, 4) for model in report.models}
    assert [row["one picture"] for row in rows_of(report)] == ["7 s", "7 s"], "without one, its drawing's"
    report.models[0].bench = result = with_decoding(result_of(0.5, 50))
    packed, original = rows_of(report)
    assert packed["one step"] == seconds_text(result.step.packed_seconds)
    assert original["one step"] == seconds_text(result.step.float_seconds)
    assert result.picture is not None and packed["one picture"] == seconds_text(result.picture.packed_seconds)
    assert original["one picture"] == seconds_text(result.picture.float_seconds)


def test_conditions_of_the_table_and_where_they_differ(tiny_model: DiffusionModel) -> None:
    report = reports(tiny_model)
    same = {"model": "a", "steps": 20, "seed": 3, "label": None, "clip": "rederive"}
    report.drawn = {
        Path("p.bidm"): DrawnSet(Path("x"), None, 4, same),
        Path("o.pth"): DrawnSet(Path("y"), None, 4, {**same, "model": "b", "clip": "keep_eps"}, "none"),
    }
    table = models_table(report)
    assert table is not None
    assert "4 of each model, the same seeds for all, steps 20, seed 3" in table.note
    assert "clip DIFFERS: p.bidm rederive, o.pth keep_eps" in table.note
    assert "o.pth by its own convention: clip none" in table.note and "p.bidm by" not in table.note
    assert "label" not in table.note and "model DIFFERS" not in table.note


def test_settings_of_several_models_are_the_first_packed_ones(tmp_path: Path) -> None:
    model = tiny()
    packed = packed_of(model, tmp_path / "m.bidm")
    packed.recipe["sampler"] = {"name": "dpm++", "steps": 7, "eta": 0.0}
    found = common_settings([model, packed], SamplingOptions(seed=4))
    assert (found.sampler, found.steps, found.seed, found.clip) == ("dpm++", 7, 4, True)
    assert common_settings([model, packed], SamplingOptions(clip=False)).clip is False
    assert common_settings([model], SamplingOptions()).clip is None, "its own convention"
    assert common_settings([model, student_of(model)], SamplingOptions()).clip is True
