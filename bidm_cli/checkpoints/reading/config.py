"""Configuration files: the families' own YAML, or JSON with the arguments of the original constructors.

A configuration may refer to itself, as omegaconf's do: ``${data.image_size}`` is that setting. The file that
wandb keeps of a run has each setting in a mapping with its description.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bidm_cli.checkpoints.reading.plain_values import decoded, plain_values
from bidm_cli.checkpoints.reading.unpickle import existing_file
from bidm_cli.errors import BidmError

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST_FILE = 16 << 20
_LARGEST_YAML = 1 << 19
_MOST_VALUES = 1 << 20
_LONGEST_LIST = 64
_LARGEST_SIDE = 1 << 14
_LONGEST_CHAIN = 8
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_MISSING = object()
T = TypeVar("T")


class Section:
    """A mapping of a configuration file; reading from it checks types and says where something is wrong."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The value as it stands; null counts as absent. BidmError without a default."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise BidmError(f"{self.where} has no {name!r}")
        return default

    def section(self, name: str) -> Section:
        """The mapping under ``name``; an empty one if it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "a mapping", value)
        return Section(value, f"{self.where}: {name}" if ": " not in self.where else f"{self.where}.{name}")

    def inside(self, name: str) -> Section:
        """The mapping under ``name``, or this one where there is none."""
        return self.section(name) if name in self else self

    def choice(self, name: str, words: Mapping[str, T], default: Any = _MISSING, wanted: str = "") -> T:
        """The meaning of a word among ``words``; ``wanted`` lists them for the message."""
        word = self.text(name, default)
        if word not in words:
            raise self.wrong(name, wanted or " or ".join(words), word)
        return words[word]

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number; YAML reads 1e-4 as text, which counts too."""
        value = self.get(name, default)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(name, "a number", value) from None
        if isinstance(value, bool) or not math.isfinite(number):
            raise self.wrong(name, "a number", value)
        return number

    def integer(self, name: str, default: Any = _MISSING) -> int:
        """A whole number."""
        number = self.number(name, default)
        if number != int(number):
            raise self.wrong(name, "a whole number", number)
        return int(number)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, (bool, int)):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "text", value)
        return value

    def numbers(self, name: str, default: Any = _MISSING) -> list[Any]:
        """A list of numbers (a single one counts); whole numbers come as int, others as float."""
        value = self.get(name, default)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(items) > _LONGEST_LIST:
            raise self.wrong(name, f"a list of at most {_LONGEST_LIST} numbers", value)
        found = [Section({name: item}, self.where).number(name) for item in items]
        return [int(number) if number == int(number) else number for number in found]

    def side(self, name: str) -> int:
        """The side of an image in pixels."""
        size = self.integer(name)
        if not 1 <= size <= _LARGEST_SIDE:
            raise self.wrong(name, f"an image size from 1 to {_LARGEST_SIDE}", size)
        return size

    def sides(self, name: str) -> tuple[int, int]:
        """(height, width) of an image in pixels; a single number counts for both."""
        sides = self.numbers(name)
        if len(sides) not in (1, 2) or not all(isinstance(n, int) and 1 <= n <= _LARGEST_SIDE for n in sides):
            raise self.wrong(name, "one or two whole numbers", sides)
        return sides[0], sides[-1]

    def wrong(self, name: str, wanted: str, value: Any) -> BidmError:
        """The error for a value of the wrong type."""
        return BidmError(f"{self.where}: {name} must be {wanted}, not {repr(value)[:60]}")


def first(read: Callable[[Section, str], T], *places: tuple[Section, str]) -> T | None:
    """The first of these settings that is there; None without any."""
    return next((read(section, name) for section, name in places if name in section), None)


@dataclass(frozen=True)
class Config:
    """A configuration file.

    Attributes:
        layout: the family it belongs to ("ldm", "ddpm", ..., "first stage"); None if unknown.
        kind: "yaml" for the family's own file, "arguments" for JSON of constructor arguments, "json" for
            diffusers' own.
    """

    path: Path
    root: Section
    layout: str | None
    kind: str


def read_section(path: str | Path) -> Section:
    """The settings of a YAML or JSON file.

    Raises:
        BidmError: no such file, or not a configuration.
    """
    path = existing_file(path)
    try:
        # YAML is read by Python, some hundred kB a second.
        if path.stat().st_size > (_LARGEST_FILE if path.suffix == ".json" else _LARGEST_YAML):
            raise BidmError(f"{path} is too large for a configuration file")
        values = plain_values(decoded(path.read_bytes()), path.suffix == ".json")
        if not isinstance(values, dict) or not values:
            raise BidmError(f"{path} is not a configuration: it holds no named settings")
        if _expanded(values, {}) > _MOST_VALUES:
            raise BidmError(f"{path} is not a configuration: its references unfold to millions of values")
        values = _of_run(values)
        return Section(_resolved(values, values), str(path))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        message = " ".join(str(error).split())[:160]
        raise BidmError(f"{path} is not valid YAML or JSON: {message}") from error
    except OSError as error:
        raise BidmError(f"{path} cannot be read: {error.strerror}") from error


def _of_run(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of wandb's file of a run; others as they are."""
    named = {name: value for name, value in values.items() if name not in ("_wandb", "wandb_version")}
    wrapped = named and all(
        isinstance(value, dict) and "value" in value and value.keys() <= {"value", "desc"}
        for value in named.values()
    )
    return {name: value["value"] for name, value in named.items()} if wrapped else values


def _resolved(value: Any, root: dict[str, Any]) -> Any:
    """``value`` with references to settings of ``root`` replaced by these; those that lead nowhere stay."""
    if isinstance(value, dict):
        return {name: _resolved(item, root) for name, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, root) for item in value]
    for _ in range(_LONGEST_CHAIN):
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            break
        found: Any = root
        for name in match[1].split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if found is None:
            break
        value = found
    return value


def _expanded(value: Any, known: dict[int, float]) -> float:
    """Number of values with every YAML alias written out; infinite where one contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(item, known) for item in inner)
    return known[id(value)]
