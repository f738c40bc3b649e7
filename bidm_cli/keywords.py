"""Keyword arguments that are fields of option records, so that each list of options is written once.

def draw(model, options=Options(), source=Source(), **keywords):
    options, source = with_keywords(keywords, options, source)      # draw(model, steps=50, mask="m.png")
"""

from __future__ import annotations

import dataclasses
from typing import Any


def with_keywords(keywords: dict[str, Any], *records: Any) -> tuple[Any, ...]:
    """Copies of dataclass instances with the fields named in ``keywords`` replaced.

    Raises:
        TypeError: a keyword is a field of none of them, as Python says of an unknown argument.
    """
    names = [{field.name for field in dataclasses.fields(record)} for record in records]
    known = set().union(*names)
    unknown = ", ".join(sorted(keywords.keys() - known))
    if unknown:
        raise TypeError(f"unexpected keyword {unknown}; known are {', '.join(sorted(known))}")
    return tuple(
        dataclasses.replace(record, **{name: keywords[name] for name in own & keywords.keys()})
        for record, own in zip(records, names, strict=True)
    )
