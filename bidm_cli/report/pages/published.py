"""Published savings and quality beside those of a report's models, where the network is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bidm_cli.report.metrics.compare import Score
from bidm_cli.report.pages.summary import ModelReport
from bidm_cli.report.pages.tables import Table, ratio_text


@dataclass(frozen=True)
class Published:
    """Row of a paper's table: network (by its number of parameters), savings, quality with conditions."""

    parameters: int
    name: str
    storage: str
    operations: str
    fid: str
    conditions: str


PUBLISHED = (
    Published(
        274_056_163,
        "BiDM, the paper: LDM-4, LSUN-Bedrooms 256",
        "28.0x",
        "52.7x",
        "22.74",
        "DDIM, 100 steps, eta 0; float 2.99 (arXiv 2412.05926)",
    ),
)


def published_table(models: Sequence[ModelReport], scores: Sequence[Score]) -> Table | None:
    """Published rows, each with the binary models of the same network below it; None if there is none."""
    rows = []
    for known in PUBLISHED:
        same = [model for model in models if model.cost.binary_layers and _is(known, model)]
        if same:
            rows.append((known.name, known.storage, known.operations, known.fid, known.conditions))
        rows += [(*_own(model), *_quality(model, scores)) for model in same]
    columns = ["", "storage of the network", "operations, paper's convention", "FID", "conditions"]
    return Table("Beside the paper", columns, rows, frozenset({0, 4})) if rows else None


def _is(known: Published, model: ModelReport) -> bool:
    return model.cost.parameters == known.parameters


def _own(model: ModelReport) -> tuple[str, str, str]:
    return str(model.path), ratio_text(model.cost.storage_ratio), ratio_text(model.cost.ops_ratio)


def _quality(model: ModelReport, scores: Sequence[Score]) -> tuple[str, str]:
    """FID and its conditions, of the samples that this model drew."""
    for score in scores:
        drawn_by = score.samples.settings.get("model")
        if score.metric == "FID" and score.value is not None and drawn_by and drawn_by == model.sha256:
            conditions = score.samples.settings_text()
            return f"{score.value:.2f}", f"{conditions}; n {score.samples.count}, {score.reference.path}"
    return "-", "no FID of its samples in this report"
