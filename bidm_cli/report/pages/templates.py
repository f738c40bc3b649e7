"""Templates of the page: HTML and SVG in which every value is escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=PackageLoader("bidm_cli.report.pages", ""),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)


def render(name: str, **values: Any) -> Markup:
    """Fill in the template file ``name``; only what this function returned is not escaped again."""
    return Markup(_TEMPLATES.get_template(name).render(values))
