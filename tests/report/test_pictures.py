"""Pictures of several sets number by number, published numbers beside ours, and the legend of many models."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.base import SetStatistics
from bidm_cli.report.metrics.compare import Score
from bidm_cli.report.pages.page import to_html
from bidm_cli.report.pages.pictures import COUNT, compare_pictures, data_url
from bidm_cli.report.pages.plots import WIDTH, Series, line_plot
from bidm_cli.report.pages.published import PUBLISHED, published_table
from bidm_cli.report.pages.summary import ModelReport, Report, summarize
from tests.report.models import packed_of
from tests.report.test_metrics import statistics_from
from tests.report.test_render import mean_color, read
from tests.report.test_summary import TRAINING

SETTINGS = {"steps": 20, "sampler": "ddim", "seed": 0, "label": None}


def drawn(
    folder: Path, count: int, level: int, settings: dict[str, Any] | None = None, size: int = 8
) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), level + i, np.uint8)).save(folder / f"{i:06d}.png")
    if settings is not None:
        (folder / "sample.json").write_text(json.dumps({"settings": settings, "n": count}))
    return folder


@pytest.fixture
def packed(tiny_model: DiffusionModel, tmp_path: Path) -> ModelReport:
    model = packed_of(tiny_model, tmp_path / "m.bidm", training=TRAINING)
    return replace(summarize(model, model.path), provenance={"source": "o.ckpt", "sha256": "f" * 64})


def test_sets_are_named_by_the_models_that_drew_them(packed: ModelReport, tmp_path: Path) -> None:
    sets = [
        drawn(tmp_path / "original", 3, 0, {**SETTINGS, "model": "f" * 64}),
        drawn(tmp_path / "mine", 5, 100, {**SETTINGS, "model": sha256_of(packed.path)}),
    ]
    found = compare_pictures(sets, [packed])
    assert found is not None and found.count == 3 and not found.warnings
    assert [one.name for one in found.sets] == ["o.ckpt (original)", "m.bidm"]
    assert (found.left, found.right) == (0, 1)
    assert found.sets[1].conditions == "steps 20, sampler ddim, seed 0"
    other = compare_pictures(sets[::-1], [packed])
    assert other is not None and (other.left, other.right) == (1, 0), "the original is on the left"


def test_pictures_that_do_not_belong_together_are_said_to(tmp_path: Path) -> None:
    sets = [
        drawn(tmp_path / "a", 2, 0, {**SETTINGS, "model": "a", "ema": True}),
        drawn(tmp_path / "b", 2, 9, {**SETTINGS, "model": "b", "ema": False, "seed": 1, "label": [1, 2]}),
        drawn(tmp_path / "c", 2, 9),
        tmp_path / "none",
    ]
    found = compare_pictures(sets, [])
    assert found is not None and len(found.sets) == 3 and len(found.notes) == 1
    text = "\n".join(found.warnings)
    assert "seed 0" in text and "label null" in text and "[1, 2]" in text and "ema" not in text
    assert "c: no sample.json" in text
    assert compare_pictures(sets[3:] + sets[:1], []) is None, "one set has nothing to be compared with"


def test_damaged_records_and_many_pictures(tmp_path: Path) -> None:
    a, b = drawn(tmp_path / "a", COUNT + 3, 0), drawn(tmp_path / "b", COUNT + 1, 0)
    (a / "sample.json").write_text("[1")
    (b / "sample.json").write_text('{"settings": 3}')
    found = compare_pictures([a, b], [])
    assert found is not None and found.count == COUNT and len(found.warnings) == 2


@pytest.mark.parametrize(("size", "kind", "side"), [(32, "PNG", 32), (256, "WEBP", 256), (700, "WEBP", 512)])
def test_pictures_inside_the_page(size: int, kind: str, side: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(data_url(picture).partition(",")[2])))
    assert image.format == kind and image.size == (side, side)
    if kind == "PNG":
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_the_page_of_two_sets(packed: ModelReport, tmp_path: Path) -> None:
    hostile = {**SETTINGS, "model": "x", "sampler": "<script>alert(1)</script>"}
    sets = [drawn(tmp_path / "<b>", 3, 0, hostile), drawn(tmp_path / "two", 3, 99, SETTINGS)]
    second = replace(packed, path=tmp_path / "second.bidm")
    page = to_html(Report([packed, second], samples=sets))
    reader, own = read(page), Path("bidm_cli/report/pages/page.js").read_text()
    assert reader.tags.count("script") == 1 and own in page and reader.tags.count("img") == 6
    assert all(address.startswith("data:image/") for address in reader.addresses)
    text = " ".join(reader.text)
    assert "name: bidm" in text, "the recipe"
    assert "all models" in text and "3 images, 2 DDIM steps, seed 0" in text
    assert page.count("<img") == page.count('alt="Picture') == 6


def test_published_numbers_stand_beside_the_same_network_alone(packed: ModelReport) -> None:
    assert published_table([packed], []) is None
    cost = replace(packed.cost, parameters=PUBLISHED[0].parameters)
    same = replace(packed, cost=cost)
    table = published_table([same], [])
    assert table is not None and table.rows[0][1:4] == ("28.0x", "52.7x", "22.74")
    assert table.rows[1][3] == "-" and "22.74" in to_html(Report([same]))
    one = statistics_from(np.random.default_rng(0).random((9, 3)))
    mine = replace(one, settings={"model": same.sha256, "steps": 50})
    for published, expected in ((True, "3.21"), (False, "-")):
        table = published_table([same], [_score(mine, one, published)])
        assert table is not None and table.rows[1][3] == expected
    table = published_table([same], [_score(one, one, True)])
    assert table is not None and table.rows[1][3] == "-", "samples of nobody knows which model"


def _score(samples: SetStatistics, reference: SetStatistics, published: bool) -> Score:
    network = replace(mean_color(), published=published)
    return Score({"value": 3.21}, samples, reference, network)


def test_names_of_many_models_do_not_overlap() -> None:
    series = [Series(f"a-model-with-a-long-name-{i}.bidm", [0, 1], [1, 2 + i]) for i in range(6)]
    svg = line_plot(series, "t", "error")
    places = [part.split('"')[0] for part in svg.split('<text class="tick" x="')[-6:]]
    rows = [part.split('y="')[1].split('"')[0] for part in svg.split('<text class="tick" x="')[-6:]]
    assert len(set(zip(places, rows, strict=True))) == 6 and max(map(float, places)) < WIDTH
    assert svg.count("dashed") == 4 and "a-model-with-a-long-name-5.bidm" in svg.split(">")[0]
