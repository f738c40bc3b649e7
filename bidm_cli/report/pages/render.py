"""Report as text for the terminal and as a JSON file; the page is in :mod:`bidm_cli.report.pages.page`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bidm_cli.files import write_atomically
from bidm_cli.packed.format.container import finite
from bidm_cli.report.bench.tables import kind_table, slower_notes, speed_table
from bidm_cli.report.metrics.base import SetStatistics, metric_texts
from bidm_cli.report.metrics.compare import Score
from bidm_cli.report.pages.models_table import models_table
from bidm_cli.report.pages.summary import ModelReport, Report
from bidm_cli.report.pages.tables import Table, bytes_text, cost_tables

LOSSES = {"loss": "loss", "noise_loss": "noise", "feature_loss": "features"}
"""Losses of a training log that reports show, and their names there."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all; numbers that are not finite become null.

    Raises:
        BidmError: the folder cannot be written to, or the disk is full.
    """
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=2) + "\n", encoding="utf-8")


def to_text(report: Report, layers: bool = False) -> str:
    """Plain text of a report; every layer if asked for, else sums by role."""
    compared = models_table(report)
    parts = [_model_text(model, layers) for model in report.models]
    parts += [] if compared is None else [compared.to_text()]
    if report.scores:
        parts.append(score_table(report.scores).to_text())
        parts.append("\n".join(score_lines(report.scores)))
    if report.notes:
        parts.append("\n".join(f"Note: {note}" for note in report.notes))
    return "\n\n".join(parts)


def _model_text(model: ModelReport, layers: bool) -> str:
    tables = cost_tables(model.cost, model.sizes, layers)
    lines = ["\n".join(model_lines(model) + [f"  {line}" for line in model.caveats])]
    lines += [table.to_text() for table in (tables if model.cost.binary_layers else tables[:1])]
    measured = (
        training_lines(model),
        trajectory_lines(model),
        first_stage_lines(model),
        agreement_lines(model),
    )
    lines += ["\n".join(part) for part in measured if part]
    if model.bench is not None:
        lines += [kind_table(model.bench).to_text()] if model.bench.layers else []
        lines.append(speed_table(model.bench).to_text())
        lines += slower_notes(model.bench)
    lines += [f"Note: {note}" for note in model.notes]
    return "\n\n".join(lines)


def model_lines(model: ModelReport) -> list[str]:
    """Path, recipe, family, size and source of a model, in one or two lines."""
    made = f"recipe {model.recipe}" if model.recipe else "an original checkpoint"
    lines = [f"{model.path}: {made}, family {model.family}, {bytes_text(model.file_bytes)}"]
    if model.provenance:
        facts = [f"made from {model.provenance.get('source') or 'unknown'}"]
        if model.provenance.get("sha256"):
            facts.append(f"SHA-256 {str(model.provenance['sha256'])[:12]}...")
        facts.append(f"seed {model.provenance.get('seed')}")
        lines.append("  " + ", ".join(facts))
    return lines


def training_lines(model: ModelReport) -> list[str]:
    """Steps and last losses of the distillation."""
    steps = model.provenance.get("steps")
    if not model.losses:
        return [] if steps is None else [f"Training: {steps} steps, no losses recorded"]
    last = model.losses[-1]
    shown = [f"{name} {last[key]:.5g}" for key, name in loss_names(model).items() if key in last]
    return [f"Training: {steps or int(last['step'])} steps; at the end: {', '.join(shown)}"]


def loss_names(model: ModelReport) -> dict[str, str]:
    """Losses worth showing: the whole, and its parts where more than one is there."""
    parts = [key for key in LOSSES if key != "loss" and any(row.get(key) for row in model.losses)]
    return {key: name for key, name in LOSSES.items() if key == "loss" or (key in parts and len(parts) > 1)}


def agreement_lines(model: ModelReport) -> list[str]:
    """Rate of signs that rounding flips between the backend and the float simulation."""
    flips = model.agreement
    if flips is None:
        return []
    return [
        f"Agreement with the float simulation: rounding flipped {flips.flipped:,} of {flips.signs:,} signs "
        f"({100 * flips.rate:.2g} %), outputs within {flips.output_error:.2g} of the largest"
    ]


def trajectory_lines(model: ModelReport) -> list[str]:
    """Trajectory error with images, steps and seed of its measurement."""
    error = model.trajectory
    if error is None or not isinstance(error.get("mean"), float):
        return []
    share = share_text(error)
    return [
        f"Trajectory error: {error['mean']:.5f}{', ' + share if share else ''} "
        f"({error.get('n')} images, {error.get('steps')} DDIM steps, seed {error.get('seed')}; "
        f"{model.trajectory_source})"
    ]


def first_stage_lines(model: ModelReport) -> list[str]:
    """Errors of the packed decoder's pictures, with the latents that they are of."""
    stage = model.first_stage
    if stage is None:
        return []
    psnr, similarity = stage.get("psnr"), stage.get("ssim")
    found = "as those of" if psnr is None else f"with {psnr:.1f} dB PSNR"
    if psnr is not None:
        found += f", {similarity:.4f} SSIM" if isinstance(similarity, float) else ""
        found += " to those of"
    latents = f"{stage.get('n')} latents {model.first_stage_source}"
    return [f"First stage: pictures {found} the original decoder ({latents})"]


def share_text(trajectory: dict[str, Any]) -> str:
    """Relative trajectory error as a share of the original's mean square; empty if it is not recorded."""
    share = trajectory.get("relative")
    return f"{100 * share:.2f} % of the original's mean square" if isinstance(share, float) else ""


def score_table(scores: list[Score]) -> Table:
    """One row per set of samples, one column per value of a registered metric."""
    texts = metric_texts()
    rows = []
    for score in scores:
        values = [_value_text(score, name, texts[name]) for name in score.values]
        counts = [_count_text(one) for one in (score.samples, score.reference)]
        rows.append((str(score.samples.path), score.metric, *values, *counts))
    names = [name.replace("_", " ") for name in scores[0].values]
    columns = ["samples", "metric", *names, "n", "n reference"]
    return Table("Image quality", columns, rows, frozenset({0, 1}))


def _value_text(score: Score, name: str, text: Callable[[float], str]) -> str:
    """Value with its uncertainty, where that is known: "12.345 ± 0.021"."""
    value, estimate = score.values[name], score.estimates.get(name)
    if value is None:
        return "-"
    if estimate is None:
        return text(value)
    error = text(estimate.error)
    return f"{text(value)} ± {error}" if estimate.center is None else f"{text(value)} (± {error})"


def _uncertainty_lines(score: Score) -> list[str]:
    """Origin of each uncertainty, which a value must be quoted with."""
    texts, lines = metric_texts(), []
    for name, one in score.estimates.items():
        shown = score.metric if name == "value" else name.replace("_", " ")
        mean = "" if one.center is None else f", whose mean is {texts[name](one.center)}"
        lines.append(f"  {score.samples.path}, {shown}: ± is the deviation over {one.method}{mean}")
    return lines


def _count_text(one: SetStatistics) -> str:
    """Number of images, or that the distance is to saved statistics."""
    if not one.is_saved:
        return str(one.count)
    return "saved" if one.count is None else f"saved ({one.count})"


def score_lines(scores: list[Score]) -> list[str]:
    """Features, reference and settings that values must be quoted with; warnings once each."""
    network, reference = scores[0].network, scores[0].reference
    lines = [
        f"  features: {network.name}, weights SHA-256 {network.weights_sha256}",
        f"  resize: {network.resize}",
        f"  reference: {reference.path}, SHA-256 of its {reference.hashed} {reference.sha256}",
    ]
    lines += [f"  reference: {note}" for note in reference.notes]
    for score in scores:
        lines += [f"  {score.samples.path}: {note}" for note in score.samples.notes]
        settings = score.samples.settings_text()
        lines += [f"  {score.samples.path}: {settings}"] if settings else []
        lines += _uncertainty_lines(score)
    warnings = dict.fromkeys(warning for score in scores for warning in score.warnings)
    return lines + [f"  Warning: {warning}" for warning in warnings]
