"""Plots are well-formed SVG with their points in the right places; grids hold the images."""

from __future__ import annotations

import base64
import io
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bidm_cli.errors import BidmError
from bidm_cli.report.pages.plots import HEIGHT, WIDTH, Series, line_plot, sample_grid


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    lines = [element.attrib["points"] for element in root.iter("polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]  # type: ignore[misc]


def test_a_line_runs_from_left_to_right_and_upwards() -> None:
    (points,) = points_of(line_plot([Series("a", [0, 1, 2], [1, 2, 3])], "x", "y"))
    assert points[0][0] < points[1][0] < points[2][0] and points[0][1] > points[1][1] > points[2][1]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.2)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_log_axis() -> None:
    (points,) = points_of(line_plot([Series("a", [0, 1, 2], [0.01, 0.1, 1])], "x", "y", log=True))
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.2)


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    series = [Series("a", [0, 1, 2, 3], [1.0, math.nan, 0.0, 2.0]), Series("b", [0], [math.inf])]
    assert [len(line) for line in points_of(line_plot(series, "x", "y", log=True))] == [2]
    assert line_plot(series[1:], "x", "y") == ""
    assert line_plot([], "x", "y") == ""


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0, 0.0], [-3.0, 4e9]])
def test_flat_single_and_huge_values_are_drawn(values: list[float]) -> None:
    svg = line_plot([Series("a", list(range(len(values))), values)], "x", "y")
    assert len(points_of(svg)[0]) == len(values) and "nan" not in svg


def test_names_are_escaped() -> None:
    assert "<b>" not in line_plot([Series("<b>", [0, 1], [1, 2])], "<b>", "<b>")


def decoded(url: str) -> np.ndarray:
    content = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def test_grid_holds_the_first_images(tmp_path: Path) -> None:
    images = np.stack([np.full((8, 8), 40 * i, np.uint8) for i in range(6)])
    np.savez(tmp_path / "a.npz", images=images)
    grid = decoded(sample_grid(tmp_path / "a.npz", limit=4))
    side = grid.shape[0] // 2
    assert [int(grid[y, x, 0]) for y in (4, side + 4) for x in (4, side + 4)] == [0, 40, 80, 120]


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 512, 512, 3), np.uint8))
    assert max(decoded(sample_grid(tmp_path / "a.npz")).shape) <= 1100


def test_no_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BidmError):
        sample_grid(tmp_path / "gone")
