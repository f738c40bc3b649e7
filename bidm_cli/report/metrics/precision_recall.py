"""Improved precision and recall: nearest-neighbour coverage between two sets of features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bidm_cli.report.metrics.base import SetStatistics, register_metric
from bidm_cli.report.metrics.moments import chosen_rows

_NEIGHBOURS = 3
_MAX_NEIGHBOURHOOD = 10_000


@register_metric("precision", "recall", text=lambda share: f"{100 * share:.2f} %")
def of_sets(samples: SetStatistics, reference: SetStatistics) -> tuple[float, float] | None:
    """:func:`precision_recall` with 3 neighbours; None for saved statistics, which have no features."""
    if samples.features is None or reference.features is None:
        return None
    return precision_recall(samples.features, reference.features)


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, neighbours: int = _NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of features [N, D], [M, D].

    Precision: share of samples within the k-nearest-neighbour radius of some reference image; recall: the
    same with the roles exchanged. Of larger sets, 10,000 evenly spaced images are used.
    """
    samples, reference = _thinned(samples), _thinned(reference)
    center = reference.mean(axis=0)  # a large mean costs digits of the distances
    samples, reference = samples - center, reference - center
    radii_samples, radii_reference = _radii(samples, neighbours), _radii(reference, neighbours)
    covered, reached = np.zeros(len(samples), dtype=bool), np.zeros(len(reference), dtype=bool)
    for start, distances in _distance_blocks(samples, reference):
        rows = slice(start, start + len(distances))
        covered[rows] = (distances <= radii_reference[None]).any(axis=1)
        reached |= (distances <= radii_samples[rows, None]).any(axis=0)
    return float(covered.mean()), float(reached.mean())


def _thinned(features: np.ndarray) -> np.ndarray:
    if len(features) <= _MAX_NEIGHBOURHOOD:
        return np.asarray(features)
    return chosen_rows(features, np.linspace(0, len(features) - 1, _MAX_NEIGHBOURHOOD).astype(np.int64))


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest neighbour, itself not counted."""
    k = min(neighbours, len(features) - 1)
    radii = np.empty(len(features), features.dtype)
    for start, distances in _distance_blocks(features, features):
        distances.partition(k, axis=1)
        radii[start : start + len(distances)] = distances[:, k]
    return radii


def _distance_blocks(a: np.ndarray, b: np.ndarray, rows: int = 512) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances [rows, M]) of a [N, D] against b [M, D]."""
    squares = np.einsum("md,md->m", b, b)
    for start in range(0, len(a), rows):
        part = a[start : start + rows]
        distances = (-2 * part) @ b.T
        distances += np.einsum("nd,nd->n", part, part)[:, None]
        distances += squares
        yield start, np.maximum(distances, 0, out=distances)
