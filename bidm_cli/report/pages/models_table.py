"""One row per model: size, operations, times, errors and distances side by side."""

from __future__ import annotations

from bidm_cli.report.metrics.base import metric_texts
from bidm_cli.report.metrics.compare import Score
from bidm_cli.report.pages.summary import ModelReport, Report
from bidm_cli.report.pages.tables import Table, bytes_text, count_text, seconds_text


def models_table(report: Report) -> Table | None:
    """Table of all models of a report; None of fewer than two.

    The paper's convention counts operations; a step is timed with ``bench``, a picture while it is drawn.
    """
    if len(report.models) < 2:
        return None
    scores = {model.path: _score(report, model) for model in report.models}
    first = next((score for score in scores.values() if score is not None), None)
    names = [] if first is None else list(first.values)
    shown = [first.metric if first and name == "value" else name.replace("_", " ") for name in names]
    rows = [(*_own_cells(report, model), *_values(scores[model.path], names)) for model in report.models]
    columns = ["model", "network", "whole file", "operations", "step", "one picture", "error", *shown]
    return Table("Models", columns, rows, note=_note(report))


def _own_cells(report: Report, model: ModelReport) -> tuple[str, ...]:
    cost, drawn = model.cost, report.drawn.get(model.path)
    packed = bool(cost.binary_layers)
    error = (model.trajectory or {}).get("mean")
    return (
        model.path.name,
        bytes_text(cost.packed_bytes if packed else cost.float_bytes),
        bytes_text(model.file_bytes),
        count_text(cost.ops if packed else cost.macs),
        _step_text(report, model),
        "-" if drawn is None or drawn.seconds is None else seconds_text(drawn.seconds),
        f"{error:.5f}" if isinstance(error, float) else "-",
    )


def _step_text(report: Report, model: ModelReport) -> str:
    """Seconds of a step; an original's are those that its packed file was timed against."""
    if model.bench is not None:
        return seconds_text(model.bench.step.packed_seconds)
    if model.cost.binary_layers:
        return "-"
    timed = next((one.bench for one in report.models if one.bench is not None), None)
    return "-" if timed is None else seconds_text(timed.step.float_seconds)


def _score(report: Report, model: ModelReport) -> Score | None:
    drawn = report.drawn.get(model.path)
    return next((one for one in report.scores if drawn and one.samples.path == drawn.path), None)


def _values(score: Score | None, names: list[str]) -> list[str]:
    texts = metric_texts()
    found = [None if score is None else score.values.get(name) for name in names]
    return ["-" if value is None else texts[name](value) for name, value in zip(names, found, strict=True)]


def _note(report: Report) -> str:
    """Conditions of the numbers."""
    settings = next((one.samples.settings for one in report.scores if one.samples.settings), {})
    shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "model")
    drawn = f"; pictures: {shown}, the same seeds for all" if shown else ""
    return f"operations in the paper's convention for one step; error: along the original's trajectory{drawn}"
