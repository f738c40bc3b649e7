"""The report as text, JSON and page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.report.metrics.base import statistics_of
from bidm_cli.report.metrics.compare import compare
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from bidm_cli.report.pages.page import to_html, write_page
from bidm_cli.report.pages.render import to_text, write_json
from bidm_cli.report.pages.summary import Report, summarize
from bidm_cli.report.pages.tables import count_text, ratio_text
from tests.report.models import packed_of
from tests.report.test_summary import TRAINING
from tests.report.test_timing import result_of


class Reader(HTMLParser):
    """Collects text, tags and addresses; fails on tags that do not close."""

    VOID = ("meta", "img", "br", "input", "polyline", "line", "circle", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def mean_color() -> FeatureNetwork:
    """Three features, quick."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))

    return FeatureNetwork("timm:fake", 3, "none at all", "abcd" * 16, False, forward, torch.device("cpu"))


@pytest.fixture
def report(tiny_model: DiffusionModel, tmp_path: Path) -> Report:
    packed = packed_of(tiny_model, tmp_path / "m.bidm", training=TRAINING)
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 255, (6, 8, 8), dtype=np.uint8))
    made = Report([summarize(packed, packed.path)], samples=[tmp_path / "a.npz"], notes=["a note <b>"])
    network = mean_color()
    one = statistics_of(tmp_path / "a.npz", network)
    made.scores = [compare(replace(one, settings={"steps": 50, "seed": 7}), one, network)]
    return made


def test_text_says_everything(report: Report) -> None:
    text, cost = to_text(report), report.models[0].cost
    for expected in (
        ratio_text(cost.storage_ratio),
        ratio_text(cost.ops_ratio),
        ratio_text(cost.ops_ratio_with_attention),
        count_text(cost.macs),
        f"{report.models[0].file_bytes:,}",
        "Trajectory error: 0.50000, 60.00 %",
        "3 images, 2 DDIM steps, seed 0",
        "noise 0.03",
        "FD (timm:fake)",
        "abcd" * 16,
        "none at all",
        "steps 50, seed 7",
        report.scores[0].reference.sha256,
        "below 2,048",
        "Note: a note <b>",
    ):
        assert expected in text, expected
    assert "down.0.block.0.conv1" not in text
    assert "down.0.block.0.conv1" in to_text(report, layers=True)


def test_the_page_stands_alone_and_says_the_same(report: Report) -> None:
    report.models[0].bench = result_of(0.5, 50)
    page = to_html(report)
    reader, cost = read(page), report.models[0].cost
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert "url(" not in page and "@import" not in page and "script" not in reader.tags
    text = " ".join(reader.text)
    for expected in (
        ratio_text(cost.storage_ratio),
        ratio_text(cost.ops_ratio),
        "down.0.block.0.conv1",
        "Trajectory error: 0.50000",
        "FD (timm:fake)",
        report.scores[0].reference.sha256,
        "SLOWER",
        "a note <b>",
    ):
        assert expected in text, expected
    assert reader.tags.count("svg") == 2 and reader.tags.count("img") == 1


def test_a_page_of_little(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """No training, no samples, and a float checkpoint."""
    packed = packed_of(tiny_model, tmp_path / "m.bidm")
    (tmp_path / "f.pth").write_bytes(b"x")
    models = [summarize(packed, packed.path), summarize(tiny_model, tmp_path / "f.pth")]
    reader = read(to_html(Report(models)))
    assert "svg" not in reader.tags and "f.pth" in " ".join(reader.text)
    assert "an original checkpoint" in to_text(Report(models))


def test_hostile_names_stay_text(report: Report) -> None:
    report.models[0].path = Path("<script>alert(1)</script>.bidm")
    report.models[0].recipe = "<img src=x>"
    report.models[0].provenance = {"source": "<script>", "sha256": "<i>", "seed": "<b>"}
    cost = report.models[0].cost
    cost.layers[0] = replace(cost.layers[0], name="<script>x</script>", role="<script>")
    reader = read(to_html(report))
    assert "script" not in reader.tags and reader.tags.count("img") == 1
    assert "<script>x</script>" in reader.text


def test_odd_training_records_do_not_break_the_report(report: Report) -> None:
    """A packed file's metadata is whatever its writer put there."""
    report.models[0].training = {"rows": [{"step": 1, "loss": None}, {"loss": 2.0}, "x"], "final": None}
    report.models[0].trajectory = {"mean": None, "per_step": [None, 0.1], "timesteps": [5, 1]}
    read(to_html(report))
    assert "Trajectory error:" not in to_text(report)
    report.models[0].training = {"rows": "x"}
    report.models[0].trajectory = {"mean": 0.5, "per_step": 3, "timesteps": {}}
    read(to_html(report))
    assert "Trajectory error: 0.50000" in to_text(report)


def test_json_is_whole_and_has_no_nan(report: Report, tmp_path: Path) -> None:
    write_json(tmp_path / "sub" / "r.json", {**report.to_json(), "odd": [math.nan, math.inf, 1.5]})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "sub" / "r.json").read_text(), parse_constant=refuse)
    assert found["odd"] == [None, None, 1.5]
    assert found["models"][0]["cost"]["parameters"] == report.models[0].cost.parameters
    assert found["metrics"][0]["metric"] == "FD (timm:fake)" and found["notes"] == ["a note <b>"]


def test_a_target_that_cannot_be_written(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BidmError, match="cannot write"):
        write_page(tmp_path / "file" / "r.html", report)
    with pytest.raises(BidmError, match="cannot write"):
        write_json(tmp_path / "file" / "r.json", {})
