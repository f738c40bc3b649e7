"""Line plots and sample grids as text inside a page: SVG, and PNG as a data URL.

svg = line_plot([Series("loss", steps, losses)], "training step", "loss", log=True)
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bidm_cli.data.image_sets import read_image_set, to_channels

WIDTH, HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 28, 42
_MAX_GRID_PIXELS = 1024


@dataclass(frozen=True)
class Series:
    """Named line of a plot; points that are not finite (or not positive on a log axis) are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_plot(series: Sequence[Series], x_label: str, y_label: str, log: bool = False) -> str:
    """Draw lines as an SVG element, empty without points; colors are the page's ``.line0`` to ``.line3``."""
    lines = [(one.name, _points(one, log)) for one in series]
    lines = [(name, points) for name, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_axis, y_axis = _Axis.of(min(xs), max(xs), _LEFT, WIDTH - _RIGHT), _y_axis(min(ys), max(ys), log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)}">',
        *_frame(x_axis, y_axis, x_label, y_label, log),
    ]
    for i, (name, points) in enumerate(lines):
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line line{i % 4}" points="{path}"/>')
        if len(points) == 1:
            x, y = points[0]
            parts.append(
                f'<circle class="dot{i % 4}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3"/>'
            )
        parts.append(_legend(i, name))
    return "\n".join([*parts, "</svg>"])


def _points(one: Series, log: bool) -> list[tuple[float, float]]:
    """Finite points; on a log axis y is its decimal logarithm."""
    found = []
    for x, y in zip(one.x, one.y, strict=True):
        if isinstance(y, (int, float)) and math.isfinite(y) and math.isfinite(x) and (y > 0 or not log):
            found.append((float(x), math.log10(y) if log else float(y)))
    return found


@dataclass(frozen=True)
class _Axis:
    """Linear map from data to pixels."""

    low: float
    high: float
    first: float
    last: float

    @classmethod
    def of(cls, low: float, high: float, first: float, last: float) -> _Axis:
        if high <= low:
            low, high = low - 0.5, high + 0.5
        return cls(low, high, first, last)

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Four to nine round values within the axis."""
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
        count = math.floor(self.high / step) - math.ceil(self.low / step) + 1
        return [(math.ceil(self.low / step) + i) * step for i in range(count)]


def _y_axis(low: float, high: float, log: bool) -> _Axis:
    margin = 0.06 * (high - low) or (0.2 if log else abs(high) * 0.1 or 0.5)
    floor = low - margin if log or low < 0 else max(0.0, low - margin)
    return _Axis.of(floor, high + margin, HEIGHT - _BOTTOM, _TOP)


def _log_ticks(axis: _Axis) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten within the axis; of the powers alone if that is many."""
    exponents = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [e + math.log10(f) for e in exponents for f in factors]
        ticks = [t for t in ticks if axis.low <= t <= axis.high]
        if len(ticks) <= 6:
            break
    return ticks


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, log: bool) -> list[str]:
    bottom, middle = HEIGHT - _BOTTOM, (_TOP + HEIGHT - _BOTTOM) / 2
    parts = []
    for value in _log_ticks(y_axis) if log else y_axis.ticks():
        y, text = y_axis.at(value), f"{10**value:.1g}" if log else f"{value:g}"
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value in x_axis.ticks():
        x = x_axis.at(value)
        text = f"{value:g}"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    below, beside = f'x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}"', f'x="14" y="{middle}"'
    turned = f'{beside} transform="rotate(-90 14 {middle})"'
    for place, text in ((below, x_label), (turned, y_label)):
        parts.append(f'<text class="label" {place} text-anchor="middle">{html.escape(text)}</text>')
    return parts


def _legend(i: int, name: str) -> str:
    """Above the plot, side by side."""
    x, y = _LEFT + 110 * i, 12
    return (
        f'<line class="line line{i % 4}" x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}"/>'
        f'<text class="tick" x="{x + 24}" y="{y + 4}">{html.escape(name)}</text>'
    )


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
