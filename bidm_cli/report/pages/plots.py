"""Line plots and sample grids as text inside a page: SVG, and PNG as a data URL."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from bidm_cli.data.image_sets import read_image_set, to_channels
from bidm_cli.report.pages.templates import render

WIDTH, HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, WIDTH - 14, 28, HEIGHT - 42
_MAX_GRID_PIXELS = 1024
_ROW, _LETTER, _LEAST_WIDTH = 18, 6, 110
"""Of a plot's legend, in pixels: height of a row, width of a letter and of a name's place."""


@dataclass(frozen=True)
class Series:
    """Named line of a plot; points that are not finite (or not positive on a log axis) are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self, log: bool) -> list[tuple[float, float]]:
        """Points to draw; on a log axis y is its decimal logarithm."""
        return [
            (float(x), math.log10(y) if log else float(y))
            for x, y in zip(self.x, self.y, strict=True)
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
        ]


def line_plot(series: Sequence[Series], x_label: str, y_label: str, log: bool = False) -> Markup:
    """Draw lines as an SVG element (``plot.svg.j2``); empty if there are no points."""
    lines = [(one.name, points) for one in series if (points := one.points(log))]
    if not lines:
        return Markup()
    places, rows = _legend([name for name, _ in lines])
    head = _ROW * (rows - 1)
    xs, ys = zip(*(point for _, points in lines for point in points), strict=True)
    x_axis, y_axis = _Axis(min(xs), max(xs), _LEFT, _RIGHT), _y_axis(min(ys), max(ys), log)
    y_ticks = [(v, f"{10**v:.1g}") for v in _log_ticks(y_axis)] if log else y_axis.ticks()
    return render(
        "plot.svg.j2",
        width=WIDTH,
        height=HEIGHT + head,
        head=head,
        places=places,
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[(x_axis.at(value), text) for value, text in x_axis.ticks()],
        y_ticks=[(y_axis.at(value), text) for value, text in y_ticks],
        lines=[(name, [(x_axis.at(x), y_axis.at(y)) for x, y in points]) for name, points in lines],
    )


def _legend(names: Sequence[str]) -> tuple[list[tuple[int, int]], int]:
    """Place of each name's line, x and y in pixels, and the number of rows."""
    places, x, row = [], _LEFT, 0
    for name in names:
        width = max(_LEAST_WIDTH, 36 + _LETTER * len(name))
        if x > _LEFT and x + width > _RIGHT:
            x, row = _LEFT, row + 1
        places.append((x, 12 + _ROW * row))
        x += width
    return places, row + 1


class _Axis:
    """Linear map from data to pixels; an empty range of data is widened to 1."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high = (low, high) if high > low else (low - 0.5, high + 0.5)
        self.first, self.last = first, last

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[tuple[float, str]]:
        """Four to nine round values within the axis, and their texts."""
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [(i * step, f"{i * step:g}") for i in range(first, last + 1)]


def _y_axis(low: float, high: float, log: bool) -> _Axis:
    margin = 0.06 * (high - low) or (0.2 if log else abs(high) * 0.1 or 0.5)
    floor = low - margin if log or low < 0 else max(0.0, low - margin)
    return _Axis(floor, high + margin, _BOTTOM, _TOP)


def _log_ticks(axis: _Axis) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten within the axis; of the powers alone if that is many."""
    exponents = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [e + math.log10(f) for e in exponents for f in factors]
        ticks = [t for t in ticks if axis.low <= t <= axis.high]
        if len(ticks) <= 6:
            break
    return ticks


def sample_grid(path: Path, limit: int = 64) -> str:
    """Draw the first images of a set side by side as a data URL of a PNG; small ones are enlarged.

    Raises:
        BidmError: nothing readable there.
    """
    images = read_image_set(path)
    count = min(limit, len(images))
    columns = math.ceil(math.sqrt(count))
    tiles = [to_channels(images[i], 3) for i in range(count)]
    side = max(max(tile.shape[:2]) for tile in tiles)
    times = max(1, min(8, 64 // side))
    shrink = max(1, math.ceil(columns * side / _MAX_GRID_PIXELS))
    cell = side * times // shrink
    grid = np.full(((cell + 2) * math.ceil(count / columns), (cell + 2) * columns, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        scale = cell / side
        size = (max(1, round(tile.shape[1] * scale)), max(1, round(tile.shape[0] * scale)))
        way = Image.Resampling.NEAREST if shrink == 1 else Image.Resampling.LANCZOS
        resized = np.asarray(Image.fromarray(tile).resize(size, way))
        y, x = (cell + 2) * (i // columns), (cell + 2) * (i % columns)
        grid[y : y + resized.shape[0], x : x + resized.shape[1]] = resized
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
