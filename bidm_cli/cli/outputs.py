"""Files that commands write on request: an existing one is replaced only if bidm wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from bidm_cli.errors import BidmError
from bidm_cli.files import check_writable, is_taken

_KINDS_OF_JSON = ({"models", "metrics", "notes"}, {"path", "kind", "evidence"}, {"model", "step", "machine"})
"""Keys of what ``report``, ``inspect`` and ``bench`` write."""
_PAGE_BEGINS = "<title>bidm report"


def _is_own_json(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and any(keys <= content.keys() for keys in _KINDS_OF_JSON)


def _is_own_page(path: Path) -> bool:
    with open(path, "rb") as handle:
        return _PAGE_BEGINS in handle.read(4096).decode("utf-8", "replace")


def _is_statistics(path: Path) -> bool:
    from bidm_cli.data.npz import npz_keys

    try:
        return set(npz_keys(path)) == {"mu", "sigma"}
    except (OSError, BidmError):
        return False


def _unless_taken(is_own: Callable[[Path], bool]) -> Callable[..., Path | None]:
    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and is_taken(path) and not (path.is_file() and is_own(path)):
            raise BidmError(
                f"{parameter.opts[0]} {path}: this exists and bidm did not write it; choose another name, or "
                "remove it first"
            )
        if path is not None:
            check_writable(path)
        return path

    return check


json_target = _unless_taken(_is_own_json)
"""Callback of an option that names a JSON file to write: BidmError for a file that is not bidm's."""
page_target = _unless_taken(_is_own_page)
"""The same for a page of ``bidm report``."""
statistics_target = _unless_taken(_is_statistics)
"""The same for statistics of images in pytorch-fid's layout, by bidm or another program."""
