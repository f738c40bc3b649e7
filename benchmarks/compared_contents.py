"""Contents of a file or folder written by bidm, as named values, and the differences of two of them."""

from __future__ import annotations

import csv
import io
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

MAY_DIFFER = (
    "*.bidm:bidm.digest",  # follows from all the rest
    "*.bidm:bidm.provenance.versions.*",
    "*sample.json:settings.model",  # the hash of a packed file, which is compared itself
    "*result.json:seconds",
    "*result.json:packed",  # absolute paths
    "*result.json:teacher",
    "*/events.*",
)
"""Patterns of values that say when, where or with which versions a file was written."""


def contents(path: Path) -> dict[str, Any]:
    """Every value of a file, or of all files in a folder, by "file:key"; arrays as numpy has them."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    values: dict[str, Any] = {}
    for file in files:
        name = str(file.relative_to(path.parent))
        if file.exists():
            values[name] = "a file"
            values |= {f"{name}:{key}": value for key, value in _values(file)}
    return {name: value for name, value in values.items() if not any(fnmatch(name, p) for p in MAY_DIFFER)}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The largest difference between two results of :func:`contents`; None if they are equal."""
    found = [(float("inf"), f"{key} is only in OLD") for key in old.keys() - new.keys()]
    found += [(float("inf"), f"{key} is only in NEW") for key in new.keys() - old.keys()]
    found += [
        _changed(key, old[key], new[key]) for key in old.keys() & new.keys() if not _equal(old[key], new[key])
    ]
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    if not found:
        return None
    more = f" (and {len(found) - 1} more of {len(old)} values)" if len(found) > 1 else ""
    return found[0][1] + more


def _values(file: Path) -> list[tuple[str, Any]]:
    """Keys and values of a file; of an unknown kind of file, its bytes."""
    kind = file.suffix
    if kind in (".bidm", ".safetensors"):
        with safe_open(file, framework="np") as handle:
            header = {name: _json(text) for name, text in (handle.metadata() or {}).items()}
            return [*_flat(header), *((name, handle.get_tensor(name)) for name in handle.keys())]  # noqa: SIM118
    if kind in (".pt", ".pth", ".ckpt"):
        return _flat(torch.load(file, map_location="cpu", weights_only=True))
    if kind == ".png":
        return [("pixels", np.asarray(Image.open(file)))]
    if kind in (".npy", ".npz"):
        loaded = np.load(file)
        return [("array", loaded)] if kind == ".npy" else list(loaded.items())
    if kind in (".json", ".yaml", ".yml"):
        return _flat(yaml.safe_load(file.read_text()) if kind != ".json" else json.loads(file.read_text()))
    if kind == ".csv":
        return _flat(list(csv.reader(io.StringIO(file.read_text()))))
    return [("bytes", np.frombuffer(file.read_bytes(), np.uint8))]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts and lists, by dotted names; an empty dict or list is a leaf."""
    if isinstance(value, torch.Tensor):
        return [(name, value.detach().numpy())]
    if isinstance(value, (dict, list, tuple)) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, part in entries for leaf in _flat(part, f"{name}.{key}" if name else str(key))]
    return [(name, value)]


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()
    return type(old) is type(new) and repr(old) == repr(new)


def _changed(name: str, old: Any, new: Any) -> tuple[float, str]:
    """(largest difference, a line on it); infinite where values cannot be subtracted."""
    if not (isinstance(old, np.ndarray) and isinstance(new, np.ndarray)):
        numbers = all(isinstance(value, (int, float)) for value in (old, new))
        return abs(old - new) if numbers else float(
            "inf"
        ), f"{name}: {str(old)[:80]!r}, then {str(new)[:80]!r}"
    if old.dtype != new.dtype or old.shape != new.shape:
        return float("inf"), f"{name}: {old.dtype} {old.shape}, then {new.dtype} {new.shape}"
    gap = np.abs(old.astype(np.float64) - new.astype(np.float64))
    largest = float(np.nanmax(gap))
    return largest, f"{name}: {np.count_nonzero(gap)} of {gap.size} numbers differ, by up to {largest:.3g}"
