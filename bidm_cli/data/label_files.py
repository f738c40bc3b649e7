"""Files of class labels: what data sets keep beside their images, and what users write.

* dataset.json of StyleGAN and EDM (NVlabs/edm, training/dataset.py): {"labels": [[name, label], ...]} or null
* metadata.csv and metadata.jsonl of Hugging Face's imagefolder: ``file_name`` and a column of labels
* a user's own: .json, .yaml, .csv or .txt of names (folders or files) and labels, .npy or .npz of numbers [N]
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bidm_cli.data.labels import Labels, named, no_labels, prefix_of
from bidm_cli.data.npz import load_npz_array, npz_keys
from bidm_cli.errors import BidmError, first_line

METADATA = ("metadata.csv", "metadata.jsonl")
LABEL_NAMES = ("labels", "label", "class", "classes", "class_id", "class_label", "class_labels", "class_name",
               "y", "target", "targets", "arr_1")  # fmt: skip
"""Names of columns and arrays that hold labels."""
_FILE_NAMES = ("file_name", "filename", "file", "image", "path", "name", "folder", "wnid", "synset")
_MAX_BYTES = 1 << 30

Read = Callable[[str], bytes]


def dataset_json_labels(images: Sequence[str], place: str, read: Read) -> Labels:
    """Labels from a dataset.json at the relative path ``place``; its folders are no classes."""
    try:
        found = json.loads(read(place))
        entries = found.get("labels") if isinstance(found, dict) else found
    except (BidmError, ValueError, RecursionError) as error:
        return no_labels(place, _instead(f"{place} cannot be read ({first_line(error)})"))
    if entries is None:
        return no_labels(place, _instead(f"{place} says that there are no labels"))
    return _by_name(images, place, lambda: _pairs(entries), place.rpartition("/")[0])


def metadata_labels(images: Sequence[str], places: Sequence[str], read: Read) -> Labels:
    """Labels from the column of metadata files, whose names are relative to their own folders."""
    source = places[0] if len(places) == 1 else f"{len(places)} files {places[0].rpartition('/')[2]}"

    def pairs() -> dict[str, Any]:
        found = {}
        for place in places:
            folder = place.rpartition("/")[0]
            for name, value in _rows(read(place), place).items():
                found[f"{folder}/{name}" if folder else name] = value
        return found

    return _by_name(images, source, pairs, "")


def cls_labels(images: Sequence[str], texts: Sequence[str | None]) -> Labels:
    """Labels from the contents of a webdataset's .cls files, one for each image; None where there is none."""
    missing = [image for image, text in zip(images, texts, strict=True) if text is None]
    if missing:
        few = f"{len(missing):,} of {len(images):,} images (first {missing[0]})"
        return no_labels(".cls", _instead(f"there is no .cls for {few}"))
    pairs = dict(zip(images, texts, strict=True))
    return _by_name(images, ".cls files", lambda: pairs, "")


def user_labels(images: Sequence[str], path: Path) -> Labels:
    """Labels of a file that the user names; folders and files by their names, arrays by number.

    Raises:
        BidmError: no such file, or one that cannot be read.
    """
    if not path.is_file():
        raise BidmError(
            f"{path}: no such file; `data_labels` takes a file of labels, or folders, names or imagenet"
        )
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return Labels(path.name, _array(path, len(images)))
    content = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else b""
    try:
        if suffix in (".json", ".yaml", ".yml"):
            text = content.decode("utf-8-sig")
            found = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
            pairs = _pairs(found.get("labels", found) if isinstance(found, dict) else found)
        else:
            pairs = _rows(content, str(path))
    except BidmError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise BidmError(f"{path} (`data_labels`) cannot be read: {first_line(error)}") from error
    labels = _by_name(images, path.name, lambda: pairs, "", folders=True)
    if labels.index is None:
        raise BidmError(f"`data_labels`: {labels.problem}")
    return labels


def integer_labels(values: np.ndarray, where: str, count: int) -> np.ndarray:
    """An array of ``count`` labels as int64 [N]: whole numbers [N] or [N, 1], or one-hot rows [N, C].

    Raises:
        BidmError: anything else.
    """
    found = values
    if found.ndim == 2 and len(found) == count and found.shape[1] > 1:
        one_hot = found.dtype.kind in "iufb" and bool(((found == 0) | (found == 1)).all())
        if one_hot and bool((found.sum(axis=1) == 1).all()):
            found = found.argmax(axis=1)
    if found.shape == (count, 1):
        found = found[:, 0]
    if found.shape == (count,) and found.dtype.kind == "f" and bool((found == np.round(found)).all()):
        found = found.astype(np.int64)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise BidmError(
            f"{where} is {values.dtype} {values.shape}; {count} images need {count} integer labels"
        )
    return found.astype(np.int64)


def _array(path: Path, count: int) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        keys = npz_keys(path)
        key = next(
            (name for name in (*LABEL_NAMES, "arr_0") if name in keys), keys[0] if len(keys) == 1 else None
        )
        if key is None:
            raise BidmError(
                f"{path} holds the arrays {', '.join(keys) or 'none'}; call the one to use 'labels'"
            )
        return integer_labels(load_npz_array(path, key), f"{path} [{key}]", count)
    try:
        values = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's header goes through Python's own parser, whatever that raises
        raise BidmError(f"{path} is not a .npy file of numbers, or damaged: {first_line(error)}") from error
    return integer_labels(np.asarray(values), str(path), count)


def _by_name(
    images: Sequence[str],
    source: str,
    pairs: Callable[[], Mapping[str, Any]],
    folder: str,
    folders: bool = False,
) -> Labels:
    """Labels of images by their names below ``folder``; with ``folders`` also by folder or prefix."""
    try:
        by_name = pairs()
        values, missing = [], []
        for image in images:
            name = image.removeprefix(f"{folder}/") if folder else image
            key = next((key for key in _keys(name, folders) if key in by_name), None)
            if key is None:
                missing.append(image)
            else:
                values.append(_label(by_name[key], source, key))
    except BidmError as error:
        text = str(error)
        return no_labels(source, _instead(text if text.startswith(source) else f"{source}: {text}"))
    if missing:
        few = f"{len(missing)} of {len(images)} images (first {missing[0]})"
        return no_labels(source, _instead(f"{source} has no label for {few}"))
    if all(isinstance(value, int) for value in values):
        return Labels(source, np.array(values, dtype=np.int64))
    return named(f"classes in {source}", [str(value) for value in values])


def _keys(name: str, folders: bool) -> list[str]:
    if not folders:
        return [name]
    *parents, file = name.split("/")
    paths = ["/".join(parents[:depth]) for depth in range(len(parents), 0, -1)]
    return [name, file, file.rpartition(".")[0], *paths, *reversed(parents), prefix_of(name)]


def _label(value: Any, source: str, name: str) -> int | str:
    """One label: a whole number, a name, or a one-hot vector."""
    if isinstance(value, (list, tuple)) and len(value) > 1 and sorted(map(str, value))[-1] in ("1", "1.0"):
        ones = [i for i, one in enumerate(value) if one == 1]
        if len(ones) == 1 and all(one in (0, 1) for one in value):
            return ones[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10:
        return int(text)
    if isinstance(text, bool) or not isinstance(text, (int, str)) or text == "":
        raise BidmError(f"{source} has {str(value)[:40]!r} as the label of {name}, no number or name")
    return text


def _pairs(entries: Any) -> dict[str, Any]:
    """A mapping, or a list of [name, label] pairs, by name."""
    if isinstance(entries, dict):
        return {str(name).replace("\\", "/").strip("/"): value for name, value in entries.items()}
    is_list = isinstance(entries, list)
    if not is_list or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in entries):
        raise BidmError("labels are no list of [name, label] pairs, and no mapping")
    return {str(name).replace("\\", "/").strip("/"): value for name, value in entries}


def _rows(content: bytes, place: str) -> dict[str, Any]:
    """Labels by name from lines of JSON, or from rows of a table.

    Raises:
        BidmError: not that, or no column of labels.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BidmError(f"{place} is not a text file in UTF-8") from error
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if place.endswith(".jsonl"):
            table = [json.loads(line) for line in lines]
            return _columns(table, place)
        return _table(lines, place)
    except (ValueError, RecursionError, AttributeError, csv.Error) as error:
        raise BidmError(f"{place} cannot be read ({first_line(error)})") from error


def _table(lines: list[str], place: str) -> dict[str, Any]:
    separator = next((sign for sign in (",", "\t", ";") if lines and sign in lines[0]), " ")
    rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if any(cell in LABEL_NAMES or cell in _FILE_NAMES for cell in header):
        return _columns([dict(zip(header, row, strict=False)) for row in rows[1:]], place)
    if any(len(row) != 2 for row in rows):
        raise BidmError(f"{place} has no header with file_name and label, and not two columns")
    return _pairs([list(row) for row in rows])


def _columns(table: list[dict[str, Any]], place: str) -> dict[str, Any]:
    columns = table[0].keys() if table else ()
    name = next((column for column in _FILE_NAMES if column in columns), None)
    label = next((column for column in LABEL_NAMES if column in columns), None)
    if name is None or label is None:
        found = ", ".join(list(columns)[:8]) or "none"
        raise BidmError(f"{place} has no column of file names and labels (file_name, label); it has {found}")
    return {str(row.get(name)).replace("\\", "/"): row.get(label) for row in table}


def _instead(problem: str) -> str:
    return f"{problem}; give a file of labels (`data_labels`), or `data_labels`=folders if these are classes"
