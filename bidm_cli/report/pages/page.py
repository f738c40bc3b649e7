"""Report as one self-contained HTML file: styles, plots and images stand in it.

write_page(Path("report.html"), report)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.report.bench.tables import (
    kind_table,
    layer_speed_table,
    seconds_text,
    slower_notes,
    speed_table,
)
from bidm_cli.report.cost.cost import Cost
from bidm_cli.report.pages.plots import Series, line_plot, sample_grid
from bidm_cli.report.pages.render import (
    model_lines,
    score_lines,
    score_table,
    training_lines,
    trajectory_lines,
)
from bidm_cli.report.pages.summary import ModelReport, Report
from bidm_cli.report.pages.tables import (
    Table,
    breakdown_table,
    bytes_text,
    count_text,
    file_table,
    layer_table,
    ratio_text,
    role_table,
    savings_table,
)
from bidm_cli.version import __version__


def write_page(path: Path, report: Report) -> None:
    """Write the page whole or not at all.

    Raises:
        BidmError: the folder cannot be written to, the disk is full, or samples cannot be read.
    """
    content = to_html(report)
    with write_atomically(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def to_html(report: Report) -> str:
    """HTML of the whole page.

    Raises:
        BidmError: samples that cannot be read.
    """
    names = ", ".join(model.path.name for model in report.models)
    body = [
        "<h1>Compression report</h1>",
        f'<p class="sub">bidm {__version__}, {time.strftime("%Y-%m-%d")}</p>',
        *(f'<p class="warn">{escape(note)}</p>' for note in report.notes),
        *(_headline(model) for model in report.models),
        _samples(report),
        _quality(report),
        *(_details(model, len(report.models) > 1) for model in report.models),
        "<footer>Paper's convention: multiply-accumulates of convolutions and linear layers for one sample; "
        "binary operations = BOPs / 64 + float operations, with every threshold, scale, map, shortcut and "
        "connection operation counted. Norms, activation functions and residual additions are the same in "
        "both networks and left out of both.</footer>",
    ]
    style = resources.files("bidm_cli.report.pages").joinpath("page.css").read_text(encoding="utf-8")
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>bidm report: {escape(names)}</title>\n<style>\n{style}</style></head>"
    )
    return f"{head}\n<body><main>\n" + "\n".join(part for part in body if part) + "\n</main></body></html>\n"


def _headline(model: ModelReport) -> str:
    first, *more = model_lines(model)
    parts = [
        f"<h2>{escape(str(model.path))}</h2>",
        f'<p class="sub">{escape(first.partition(": ")[2])}</p>',
        *(f'<p class="sub">{escape(line.strip())}</p>' for line in more),
        *(f'<p class="warn">{escape(note)}</p>' for note in model.notes),
        _cards(model),
    ]
    return f"<section>{''.join(parts)}</section>"


def _details(model: ModelReport, named: bool) -> str:
    cost = model.cost
    parts = [f"<h2>{escape(str(model.path))}</h2>"] if named else []
    parts.append(_training(model))
    parts += [_panel(savings_table(cost)), _operations(cost)] if cost.binary_layers else []
    if model.sizes is not None:
        parts.append(_panel(file_table(model.sizes)))
    parts += [_bench(model), _panel(role_table(cost)), _folded(layer_table(cost))]
    return "<section>" + "\n".join(part for part in parts if part) + "</section>"


def _cards(model: ModelReport) -> str:
    cost = model.cost
    cards = []
    if cost.binary_layers:
        sizes = f"{bytes_text(cost.float_bytes)} to {bytes_text(cost.packed_bytes)}"
        cards.append(_card(ratio_text(cost.storage_ratio), "less storage, the network", sizes, "good"))
        counts = f"{count_text(cost.macs)} to {count_text(cost.ops)}"
        cards.append(
            _card(ratio_text(cost.ops_ratio), "fewer operations, paper's convention", counts, "good")
        )
        counts = f"{count_text(cost.macs_with_attention)} to {count_text(cost.ops_with_attention)}"
        ratio = ratio_text(cost.ops_ratio_with_attention)
        cards.append(_card(ratio, "fewer operations with attention", counts, "good"))
    cards.append(_card(bytes_text(model.file_bytes), "whole file", f"{cost.parameters:,} parameters"))
    if trajectory_lines(model) and model.trajectory is not None:
        share = model.trajectory.get("relative")
        small = f"{100 * share:.2f} % of the teacher's mean square" if isinstance(share, float) else ""
        cards.append(_card(f"{model.trajectory['mean']:.4f}", "trajectory error", small))
    if model.bench is not None:
        step = model.bench.step
        small = f"{seconds_text(step.float_seconds)} to {seconds_text(step.packed_seconds)} a step"
        word = "faster than float" if step.ratio >= 1 else "the speed of float: SLOWER"
        cards.append(_card(ratio_text(step.ratio), word, small, "good" if step.ratio >= 1 else "bad"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(value: str, what: str, small: str = "", kind: str = "") -> str:
    return (
        f'<div class="card {kind}"><b>{escape(value)}</b><span>{escape(what)}</span>'
        f"<small>{escape(small)}</small></div>"
    )


def _panel(table: Table, bars: list[float] | None = None) -> str:
    """A titled table; ``bars`` are drawn at the ends of its rows, the longest is 1."""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    inside = f'<div class="scroll">{_table(table, bars)}</div>{note}'
    return f'<div class="panel"><h3>{escape(table.title)}</h3>{inside}</div>'


def _folded(table: Table) -> str:
    count = len(table.rows) - table.totals
    summary = f"<summary>{escape(table.title)} ({count} rows)</summary>"
    return f'<div class="panel"><details>{summary}<div class="scroll">{_table(table)}</div></details></div>'


def _table(table: Table, bars: list[float] | None = None) -> str:
    head = _cells(table, table.columns, "th") + ("<th></th>" if bars else "")
    body = []
    for i, row in enumerate(table.rows):
        total = ' class="total"' if i >= len(table.rows) - table.totals else ""
        bar = ""
        if bars is not None:
            length = bars[i] if i < len(bars) else 0.0
            bar = f'<td class="bar"><i style="width:{100 * length:.1f}%"></i></td>'
        body.append(f"<tr{total}>{_cells(table, row, 'td')}{bar}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cells(table: Table, row: Sequence[str], tag: str) -> str:
    """A column of long words is set apart and may break its lines."""
    kinds = []
    for i in range(len(row)):
        long = max((len(other[i]) for other in table.rows), default=0) > 48
        kinds.append("" if i not in table.left else ' class="word wide"' if long else ' class="word"')
    return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))


def _operations(cost: Cost) -> str:
    """Breakdown of the operations, with bars."""
    counts = list(cost.breakdown().values())
    return _panel(breakdown_table(cost), [count / max(counts) for count in counts])


def _training(model: ModelReport) -> str:
    panels = []
    if len(model.losses) > 1:
        steps = [row["step"] for row in model.losses]
        names = {"loss": "total", "noise_loss": "noise", "feature_loss": "features"}
        series = [
            Series(word, steps, [row.get(key, float("nan")) for row in model.losses])
            for key, word in names.items()
        ]
        plot = line_plot(series, "training step", "loss", log=True)
        panels.append(_figure("Training losses", plot, training_lines(model)))
    if model.trajectory_points:
        times, errors = zip(*model.trajectory_points, strict=True)
        series = [Series("student", times, errors)]
        plot = line_plot(series, "timestep (sampling runs from right to left)", "squared error", log=True)
        panels.append(_figure("Error along the teacher's trajectory", plot, trajectory_lines(model)))
    return f'<div class="two">{"".join(panels)}</div>' if panels else ""


def _figure(title: str, plot: str, lines: list[str]) -> str:
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    return f'<div class="panel"><h3>{escape(title)}</h3>{plot}{notes}</div>'


def _bench(model: ModelReport) -> str:
    if model.bench is None:
        return ""
    parts = [_panel(speed_table(model.bench))]
    parts += [f'<p class="warn">{escape(note)}</p>' for note in slower_notes(model.bench)]
    if model.bench.layers:
        parts += [_panel(kind_table(model.bench)), _folded(layer_speed_table(model.bench))]
    return "".join(parts)


def _quality(report: Report) -> str:
    if not report.scores:
        return ""
    notes = "".join(
        f'<p class="{"warn" if line.strip().startswith("Warning") else "note"}">{escape(line.strip())}</p>'
        for line in score_lines(report.scores)
    )
    table = score_table(report.scores)
    return (
        f'<section><div class="panel"><h3>{escape(table.title)}</h3>'
        f'<div class="scroll">{_table(table)}</div>{notes}</div></section>'
    )


def _samples(report: Report) -> str:
    figures = []
    for path in report.samples:
        try:
            image = sample_grid(path)
        except BidmError as error:
            # Saved statistics have no images to show; a score of them is still a score.
            figures.append(f'<p class="note">{escape(str(error))}</p>')
            continue
        figures.append(
            f'<div class="panel"><figure><figcaption>{escape(str(path))}</figcaption>'
            f'<img alt="samples" src="{image}"></figure></div>'
        )
    return f'<section><h2>Samples</h2><div class="two">{"".join(figures)}</div></section>' if figures else ""
