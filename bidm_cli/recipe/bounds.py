"""Field metadata of recipe sections: the range of a number, the registry of a name.

``eta: Annotated[float, Bounds(0, 1)]``, ``name: Annotated[str, SAMPLERS]``: both the YAML reader and
:meth:`bidm_cli.recipe.recipe.Recipe.override` check values against it.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from bidm_cli.errors import BidmError
from bidm_cli.registry import Registry


@dataclass(frozen=True)
class Bounds:
    """Range of a number, both ends included."""

    least: float
    most: float

    def check(self, what: str, value: Any) -> None:
        """Raise BidmError for a number out of the range, as NaN is; anything but numbers passes."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not self.least <= value <= self.most:
            raise BidmError(f"{what} is {value}; it takes a number from {self.least:g} to {self.most:g}")


def plain_types(hint: Any) -> tuple[Any, ...]:
    """Alternatives of a field's type, without metadata: (int, Literal["sampler"]) for ``int | ...``."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = hint.__origin__
    arguments = typing.get_args(hint)
    return arguments if arguments and typing.get_origin(hint) is not typing.Literal else (hint,)


def check_value(what: str, hint: Any, value: Any) -> None:
    """Raise BidmError unless ``value`` keeps to the metadata of its field's type ``hint``."""
    for entry in getattr(hint, "__metadata__", ()):
        if isinstance(entry, Bounds):
            entry.check(what, value)
        elif isinstance(entry, Registry) and value not in entry.names():
            raise BidmError(f"{what} is {value!r}; it takes {' or '.join(entry.names())}")


def hints(section: type) -> dict[str, Any]:
    """Types of a section's fields by name, with their metadata."""
    return typing.get_type_hints(section, include_extras=True)
