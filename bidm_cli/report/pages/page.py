"""Report as one self-contained HTML file (``report.html.j2``) with its style, plots and images inside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.report.bench.result import BenchResult, Timing
from bidm_cli.report.bench.tables import kind_table, layer_speed_table, slower_notes, speed_table
from bidm_cli.report.pages.models_table import models_table
from bidm_cli.report.pages.pictures import compare_pictures, decoded_image
from bidm_cli.report.pages.plots import Series, line_plot, sample_grid
from bidm_cli.report.pages.published import published_table
from bidm_cli.report.pages.render import (
    first_stage_lines,
    loss_names,
    model_lines,
    score_lines,
    score_table,
    share_text,
    training_lines,
    trajectory_lines,
)
from bidm_cli.report.pages.summary import ModelReport, Report
from bidm_cli.report.pages.tables import (
    breakdown_table,
    bytes_text,
    count_text,
    file_table,
    layer_table,
    ratio_text,
    role_table,
    savings_table,
    seconds_text,
    shape_text,
)
from bidm_cli.report.pages.templates import render
from bidm_cli.version import __version__

TIMESTEPS = "timestep (sampling runs from right to left)"


def write_page(path: Path, report: Report) -> None:
    """Write the page whole or not at all.

    Raises:
        BidmError: the folder cannot be written to, or the disk is full.
    """
    content = to_html(report)
    with write_atomically(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def to_html(report: Report) -> str:
    """HTML of the whole page."""
    comparison = compare_pictures(report.samples, report.models)
    trajectories = _trajectories(report.models)
    return render(
        "report.html.j2",
        version=__version__,
        models_table=models_table(report),
        date=time.strftime("%Y-%m-%d"),
        notes=report.notes,
        models=[_model(model, alone=trajectories is None) for model in report.models],
        published=published_table(report.models, report.scores),
        comparison=comparison,
        samples=[] if comparison else [_sample(path) for path in report.samples],
        trajectories=trajectories,
        scores=score_table(report.scores) if report.scores else None,
        score_lines=score_lines(report.scores) if report.scores else [],
    )


def _trajectories(models: Sequence[ModelReport]) -> dict[str, Any] | None:
    """Plot of all models' errors over timesteps, and its lines; None of fewer than two."""
    measured = [model for model in models if model.trajectory_points]
    if len(measured) < 2:
        return None
    series = [Series(model.path.name, *zip(*model.trajectory_points, strict=True)) for model in measured]
    lines = [f"{model.path.name}: {line}" for model in measured for line in trajectory_lines(model)]
    return {"plot": line_plot(series, TIMESTEPS, "squared error", log=True), "lines": lines}


def _sample(path: Path) -> tuple[Path, str, str]:
    """Path of a set of samples, and its image or the reason why there is none (saved statistics)."""
    try:
        return path, sample_grid(path), ""
    except BidmError as error:
        return path, "", str(error)


def _model(model: ModelReport, alone: bool) -> dict[str, Any]:
    """Lines, cards, figures and tables of a model, by the template's names; None for those it lacks."""
    cost, bench = model.cost, model.bench
    first, *more = model_lines(model)
    counts = list(cost.breakdown().values())
    return {
        "path": model.path,
        "lines": [first.partition(": ")[2], *more],
        "notes": model.caveats + model.notes,
        "cards": _cards(model),
        "figures": _figures(model, alone),
        "decoded": None if model.decoded is None else decoded_image(model.decoded),
        "decoded_lines": first_stage_lines(model),
        "recipe": yaml.safe_dump(model.recipe_values, sort_keys=False) if model.recipe_values else "",
        "savings": savings_table(cost) if cost.binary_layers else None,
        "operations": breakdown_table(cost),
        "bars": [count / max(counts) for count in counts] + [0.0],
        "file": None if model.sizes is None else file_table(model.sizes),
        "speed": bench and speed_table(bench),
        "slower": bench and slower_notes(bench),
        "kinds": kind_table(bench) if bench and bench.layers else None,
        "layer_speeds": bench and layer_speed_table(bench),
        "roles": role_table(cost),
        "layers": layer_table(cost),
    }


def _cards(model: ModelReport) -> list[tuple[str, str, str, str]]:
    """Value, label, detail and CSS class of each card."""
    cost, cards = model.cost, [_file_card(model)]
    picture = None if model.bench is None else model.bench.picture
    if model.bench is not None and picture is not None:
        whole = f"{model.bench.picture_steps} steps and its decoding"
        cards.append(_speed_card(model.bench, picture, "a whole picture", whole))
    if model.bench is not None:
        one = f"batch {model.bench.batch_size}"
        cards.append(_speed_card(model.bench, model.bench.step, "one step", one))
    if cost.binary_layers:
        sample = f"; a {shape_text(model.sample_shape)} sample, one step" if model.sample_shape else ""
        sizes = f"{bytes_text(cost.float_bytes)} to {bytes_text(cost.packed_bytes)}"
        counts = f"{count_text(cost.macs)} to {count_text(cost.ops)}{sample}"
        both = f"{count_text(cost.macs_with_attention)} to {count_text(cost.ops_with_attention)}{sample}"
        cards += [
            (ratio_text(cost.storage_ratio), "less storage, the network", sizes, "good"),
            (ratio_text(cost.ops_ratio), "fewer operations, paper's convention", counts, "good"),
            (ratio_text(cost.ops_ratio_with_attention), "fewer operations with attention", both, "good"),
        ]
    if trajectory_lines(model) and model.trajectory is not None:
        cards.append(_trajectory_card(model.trajectory))
    return cards


def _file_card(model: ModelReport) -> tuple[str, str, str, str]:
    """Whole file: by how much it is smaller than all of its original in float32, if it is packed."""
    parameters = f"{model.cost.parameters:,} parameters in the network"
    if not model.cost.binary_layers:
        return bytes_text(model.file_bytes), "whole file on disk", parameters, ""
    whole = model.cost.whole_float_bytes
    sizes = f"{bytes_text(whole)} in float32 to {bytes_text(model.file_bytes)}; {parameters}"
    ratio = ratio_text(whole / model.file_bytes)
    return ratio, "smaller, the whole file", sizes, "good"


def _speed_card(bench: BenchResult, timing: Timing, what: str, how: str) -> tuple[str, str, str, str]:
    times = f"{seconds_text(timing.float_seconds)} to {seconds_text(timing.packed_seconds)}"
    faster = timing.ratio >= 1
    label = "faster than float" if faster else "the speed of float, SLOWER"
    detail = f"{times}; {how}; {bench.machine['threads']} threads"
    return ratio_text(timing.ratio), f"{label}: {what}", detail, "good" if faster else "bad"


def _trajectory_card(error: dict[str, Any]) -> tuple[str, str, str, str]:
    measured = f"{error.get('n')} images, {error.get('steps')} DDIM steps, seed {error.get('seed')}"
    detail = "; ".join(part for part in (share_text(error), measured) if part)
    return f"{error['mean']:.4f}", "trajectory error", detail, ""


def _figures(model: ModelReport, alone: bool) -> list[tuple[str, Markup, list[str]]]:
    """Title, plot and lines below it of each figure; errors of several models have a plot of their own."""
    figures = []
    if len(model.losses) > 1:
        steps = [row["step"] for row in model.losses]
        series = [
            Series(name, steps, [row.get(key, float("nan")) for row in model.losses])
            for key, name in loss_names(model).items()
        ]
        plot = line_plot(series, "training step", "loss", log=True)
        figures.append(("Training losses", plot, training_lines(model)))
    if model.trajectory_points and alone:
        series = [Series(model.path.name, *zip(*model.trajectory_points, strict=True))]
        plot = line_plot(series, TIMESTEPS, "squared error", log=True)
        figures.append(("Error along the original's trajectory", plot, trajectory_lines(model)))
    return figures
