"""Pictures of several sets of samples, number by number: those from the same noise over one another."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bidm_cli.data.image_sets import read_image_set, to_channels
from bidm_cli.errors import BidmError
from bidm_cli.files import sha256_of
from bidm_cli.report.pages.summary import ModelReport

COUNT = 24
"""Pictures of a set on the page."""
_LOSSLESS, _LARGEST = 128, 512
"""Longest side in pixels up to which pictures are PNGs, and to which larger ones are made smaller."""
_WEBP_QUALITY = 92
_OF_THE_MODEL = frozenset({"model", "config", "family", "first-stage", "ema", "precision", "clip"})
"""Settings in which an original and a file packed from it may differ."""


@dataclass(frozen=True)
class PictureSet:
    """First pictures of a set of samples.

    Attributes:
        name: of the model that drew them, if the report has it, else the set's path.
        is_original: they are those of an original checkpoint in the report, or of a packed model's original.
        conditions: settings of ``bidm sample`` in one line; empty if they are not known.
        urls: data URLs of PNG or WebP.
        side: longest side of the first picture in pixels.
    """

    name: str
    is_original: bool
    conditions: str
    urls: tuple[str, ...]
    side: int


@dataclass(frozen=True)
class Comparison:
    """Sets of pictures to be laid over one another.

    Attributes:
        left, right: numbers of the sets that are shown first: the original's, and the first other one.
        count: pictures that all sets have.
        notes: sets that cannot be shown. warnings: reasons why pictures of one number do not belong together.
    """

    sets: tuple[PictureSet, ...]
    left: int
    right: int
    count: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def compare_pictures(paths: Sequence[Path], models: Sequence[ModelReport]) -> Comparison | None:
    """Sets of pictures side by side; None if fewer than two of ``paths`` hold images."""
    sets, records, notes = [], [], []
    names = _names(models)
    for path in paths:
        record = _settings(path)
        try:
            sets.append(_picture_set(path, record, names))
            records.append((path, record))
        except BidmError as error:
            notes.append(str(error))
    if len(sets) < 2:
        return None
    left = next((i for i, one in enumerate(sets) if one.is_original), len(sets) - 1)
    right = 1 if left == 0 else 0
    count = min(len(one.urls) for one in sets)
    return Comparison(tuple(sets), left, right, count, tuple(notes), tuple(_differences(records)))


def _picture_set(path: Path, record: dict[str, Any], names: dict[str, tuple[str, bool]]) -> PictureSet:
    images = read_image_set(path)
    pictures = [to_channels(images[i], 3) for i in range(min(COUNT, len(images)))]
    name, is_original = names.get(str(record.get("model")), (str(path), False))
    shown = {key: value for key, value in record.items() if key != "model" and value not in (None, [], {})}
    conditions = ", ".join(f"{key} {_value_text(value)}" for key, value in shown.items())
    urls = tuple(data_url(picture) for picture in pictures)
    return PictureSet(name, is_original, conditions, urls, max(pictures[0].shape[:2]))


def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _names(models: Sequence[ModelReport]) -> dict[str, tuple[str, bool]]:
    """(name, is original) of the models, and of those that packed ones were made from, by SHA-256."""
    names: dict[str, tuple[str, bool]] = {}
    for model in models:
        source = model.provenance.get("sha256")
        if source:
            names[str(source)] = (f"{model.provenance.get('source') or 'the original'} (original)", True)
    for model in models:
        if model.path.is_file():
            is_original = model.recipe is None
            names[sha256_of(model.path)] = (
                f"{model.path.name}{' (original)' if is_original else ''}",
                is_original,
            )
    return names


def _settings(path: Path) -> dict[str, Any]:
    """Settings of ``bidm sample`` beside the images, lists included; none without them."""
    try:
        folder = path if path.is_dir() else path.parent
        record = json.loads((folder / "sample.json").read_text(encoding="utf-8"))["settings"]
        return dict(record)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _differences(records: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Reasons why pictures of one number may not be from the same noise and conditions."""
    unknown = [str(path) for path, record in records if not record]
    lines = [f"{path}: no sample.json, so its seed and conditions are not known" for path in unknown]
    (first, settings), *others = [(path, record) for path, record in records if record] or [(Path(), {})]
    for path, record in others:
        keys = sorted((settings.keys() | record.keys()) - _OF_THE_MODEL)
        for key in keys:
            one, other = settings.get(key), record.get(key)
            if one != other:
                lines.append(f"{first} has {key} {_value_text(one)}, {path} {_value_text(other)}")
    return lines


def data_url(picture: np.ndarray) -> str:
    """Data URL of a picture, uint8 [H, W, 3]: a PNG up to 128 pixels, else a WebP of at most 512."""
    image = Image.fromarray(picture)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    lossless = max(image.size) <= _LOSSLESS
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=_WEBP_QUALITY, method=4)
    kind = "png" if lossless else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
