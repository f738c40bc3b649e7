"""Texts of the library on the command line: options in the place of arguments.

The library names arguments in backquotes, as Python users know them; here `batch_size` reads --batch-size.
"""

from __future__ import annotations

import json
import re
from typing import Any

import click

_OTHER_NAMES = {
    "labels": "--label", "data_labels": "--labels", "settings": "--set", "ema=False": "--no-ema",
    "latents_cache=False": "--no-latents-cache",
}  # fmt: skip
_ARGUMENT = re.compile(r"(?<!`)`([a-z][a-z_]*(?:=False)?)`(?!`)")


def with_options(text: str) -> str:
    """``text`` with each argument in backquotes as the option that sets it."""
    return _ARGUMENT.sub(lambda m: _OTHER_NAMES.get(m[1]) or "--" + m[1].replace("_", "-"), text)


def json_with_options(value: Any) -> Any:
    """JSON ``value`` with all its texts as :func:`with_options` has them."""
    return json.loads(with_options(json.dumps(value)))


def echo(text: str, **how: Any) -> None:
    """:func:`click.echo` of a text of the library."""
    click.echo(with_options(text), **how)
