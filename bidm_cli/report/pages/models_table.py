"""One row per model: size, operations, times, errors and distances side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bidm_cli.report.bench.result import BenchResult, Timing
from bidm_cli.report.metrics.base import metric_texts
from bidm_cli.report.metrics.compare import Score
from bidm_cli.report.pages.summary import ModelReport, Report
from bidm_cli.report.pages.tables import Table, bytes_text, count_text, seconds_text


def models_table(report: Report) -> Table | None:
    """Table of all models of a report; None of fewer than two.

    The paper's convention counts operations. Times are a benchmark's, which alternates packed and float;
    without one, a picture's is that of its drawing.
    """
    if len(report.models) < 2:
        return None
    scores = {model.path: _score(report, model) for model in report.models}
    first = next((score for score in scores.values() if score is not None), None)
    names = [] if first is None else list(first.values)
    shown = [first.metric if first and name == "value" else name.replace("_", " ") for name in names]
    rows = [(*_own_cells(report, model), *_values(scores[model.path], names)) for model in report.models]
    columns = ["model", "network", "whole file", "operations", "one step", "one picture", "trajectory error"]
    columns.append("decoder PSNR")
    table = Table("Models side by side", [*columns, *shown], rows, note=_note(report))
    return _without_empty(table)


def _without_empty(table: Table) -> Table:
    """The table without columns in which no model has a value."""
    kept = [i for i in range(len(table.columns)) if any(row[i] != "-" for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.title, [table.columns[i] for i in kept], rows, note=table.note)


def _own_cells(report: Report, model: ModelReport) -> tuple[str, ...]:
    cost, packed = model.cost, bool(model.cost.binary_layers)
    error, psnr = (model.trajectory or {}).get("mean"), (model.first_stage or {}).get("psnr")
    return (
        model.path.name,
        bytes_text(cost.packed_bytes if packed else cost.float_bytes),
        bytes_text(model.file_bytes),
        count_text(cost.ops if packed else cost.macs),
        _time_text(report, model, lambda bench: bench.step),
        _picture_text(report, model),
        f"{error:.5f}" if isinstance(error, float) else "-",
        f"{psnr:.1f} dB" if isinstance(psnr, float) else "-",
    )


def _time_text(report: Report, model: ModelReport, timing: Callable[[BenchResult], Timing | None]) -> str:
    """Seconds by the benchmark; an original's are those that the first packed file was timed against."""
    if model.bench is not None:
        found = timing(model.bench)
        return "-" if found is None else seconds_text(found.packed_seconds)
    timed = next((one.bench for one in report.models if one.bench is not None), None)
    found = None if timed is None or model.cost.binary_layers else timing(timed)
    return "-" if found is None else seconds_text(found.float_seconds)


def _picture_text(report: Report, model: ModelReport) -> str:
    if _is_timed(report):
        return _time_text(report, model, lambda bench: bench.picture)
    drawn = report.drawn.get(model.path)
    return "-" if drawn is None or drawn.seconds is None else seconds_text(drawn.seconds)


def _is_timed(report: Report) -> bool:
    """Return True if a benchmark timed whole pictures."""
    return any(model.bench is not None and model.bench.picture is not None for model in report.models)


def _score(report: Report, model: ModelReport) -> Score | None:
    drawn = report.drawn.get(model.path)
    return next((one for one in report.scores if drawn and one.samples.path == drawn.path), None)


def _values(score: Score | None, names: list[str]) -> list[str]:
    texts = metric_texts()
    found = [None if score is None else score.values.get(name) for name in names]
    return ["-" if value is None else texts[name](value) for name, value in zip(names, found, strict=True)]


def _note(report: Report) -> str:
    """Conditions of the numbers."""
    parts = [
        "network: as packed, of an original in float32",
        "operations of one step, in the paper's convention",
        "trajectory error: mean squared error of the outputs along the original's own sampling",
    ]
    timed = next((model.bench for model in report.models if model.bench is not None), None)
    if timed is not None:
        whole = f"; one picture: {timed.picture_steps} steps and its decoding" if timed.picture else ""
        parts.append(f"one step: batch {timed.batch_size}, {timed.machine.get('threads')} threads{whole}")
    elif any(one.seconds is not None for one in report.drawn.values()):
        parts.append("one picture: seconds of its drawing, decoding included, of each model after the other")
    return "; ".join(parts + _drawing(report))


def _drawing(report: Report) -> list[str]:
    """Settings of the pictures that were drawn: those of all models, then those in which they differ."""
    drawn = [(path.name, one) for path, one in report.drawn.items()]
    if not drawn:
        return []
    settings = [
        {key: one.settings.get(key) for key in drawn[0][1].settings if key != "model"} for _, one in drawn
    ]
    same = {key: value for key, value in settings[0].items() if all(one[key] == value for one in settings)}
    texts = [f"{key} {_text(value)}" for key, value in same.items() if value not in (None, [], {})]
    lines = [f"pictures: {drawn[0][1].count} of each model, the same seeds for all, {', '.join(texts)}"]
    for key in settings[0].keys() - same.keys():
        each = ", ".join(f"{name} {_text(one[key])}" for (name, _), one in zip(drawn, settings, strict=True))
        lines.append(f"{key} DIFFERS: {each}")
    own = [f"{name} by its own convention: clip {one.own_clip}" for name, one in drawn if one.own_clip]
    return lines + own


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
