"""Mean and covariance of features that may be larger than memory: rows of a file, read block by block."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator

import numpy as np

IN_MEMORY = 1 << 26
"""Features of up to 64 MiB are kept in memory, more of them in an unnamed temporary file."""
BLOCK = 1024
"""Rows that are read at a time."""


def room_for(count: int, dims: int) -> np.ndarray:
    """Make an array, float32 [N, D], in memory or (large ones) mapped from a temporary file."""
    if count * dims * 4 <= IN_MEMORY:
        return np.empty((count, dims), np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=(count, dims))


def release(features: np.ndarray) -> None:
    """Take the pages of a mapped file out of this process's memory; they are read again when needed."""
    mapped = getattr(features, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def blocks(features: np.ndarray, rows: int = BLOCK) -> Iterator[np.ndarray]:
    """Yield copies of ``rows`` rows each, float64 [rows, D]."""
    for start in range(0, len(features), rows):
        yield np.array(features[start : start + rows], dtype=np.float64)
        release(features)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean [D] and covariance [D, D] of features [N, D] in float64, in two passes."""
    mean = np.zeros(features.shape[1])
    for block in blocks(features):
        mean += block.sum(axis=0)
    mean /= len(features)
    covariance = np.zeros((features.shape[1],) * 2)
    for block in blocks(features):
        block -= mean
        covariance += block.T @ block
    return mean, covariance / (len(features) - 1)


def chosen_rows(features: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Copy some rows, in the order of ``indices``."""
    order = np.argsort(indices, kind="stable")
    found = np.empty((len(indices), features.shape[1]), features.dtype)
    for part in np.array_split(order, -(-len(order) // BLOCK)):
        found[part] = features[indices[part]]
        release(features)
    return found
