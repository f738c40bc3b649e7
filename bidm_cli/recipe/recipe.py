"""Whole recipe: read by name or path, written back as JSON or YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bidm_cli.errors import BidmError
from bidm_cli.recipe.bounds import check_value, hints
from bidm_cli.recipe.reader import read
from bidm_cli.recipe.sections import (
    Attention,
    Connections,
    Distill,
    FirstStage,
    Rule,
    Sampler,
    StageTrain,
    Store,
    Train,
)
from bidm_cli.recipe.spec import Refine

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
"""Folders in which recipes are found by name: inside the installed package, or beside it in a checkout."""

_LATER: dict[str, dict[str, Any]] = {
    "attention": {"products": "float32"},
    "distill": {"predict": "teacher"},
    "train": {"progressive": 0.0, "timestep_power": 1.0, "accumulate": 1, "checkpoint_activations": False},
    "first_stage": {"layers": (), "train": StageTrain()},
}
"""Keys that stored recipes may lack, as they came later, with the values that they stand for."""


def _first_stage_before(store: Any) -> FirstStage:
    """Section that a stored recipe without it stands for: all of the first stage, in ``store.float``."""
    return FirstStage("both", store)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        source: the file it came from; lines: of its keys there ("train", "train.steps"), for messages.
    """

    name: str
    layers: tuple[Rule, ...]
    attention: Attention = field(default_factory=Attention)
    tbs: Connections | None = None
    refine: Refine | None = None
    distill: Distill = field(default_factory=Distill)
    train: Train = field(default_factory=Train)
    sampler: Sampler = field(default_factory=Sampler)
    store: Store = field(default_factory=Store)
    first_stage: FirstStage = field(default_factory=FirstStage)
    source: str = field(default="recipe", compare=False)
    lines: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a recipe by path, or by name among the recipes that come with bidm.

        Raises:
            BidmError: no such recipe, or anything wrong in it, with file and line.
        """
        path = Path(name_or_path)
        if not path.is_file():
            places = [folder / f"{name_or_path}.yaml" for folder in FOLDERS if path.name == str(name_or_path)]
            path = next((place for place in places if place.is_file()), path)
        if not path.is_file():
            names = ", ".join(available())
            raise BidmError(f"no recipe {str(name_or_path)!r}: give a YAML file or one of {names}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BidmError(f"cannot read recipe {path}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str = "recipe") -> Recipe:
        """Recipe from YAML text; BidmError as :meth:`load`."""
        return cls(**read(text, source))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Read back :meth:`to_json`."""
        earlier = _first_stage_before(values.get("store", {}).get("float", Store.float))
        section = {"keep": earlier.keep, "weights": earlier.weights}
        return cls.parse(yaml.safe_dump({"first_stage": section, **values}), "stored recipe")

    def to_json(self) -> dict[str, Any]:
        """Resolved recipe, with every default but those of keys that came later than stored recipes."""

        def rule(r: Rule) -> dict[str, Any]:
            which = {"role": list(r.roles), "name": list(r.names)}
            form = {"keep": "float"} if r.binarize is None else {"binarize": r.binarize.to_json()}
            return {key: values for key, values in which.items() if values} | form

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [rule(item) if isinstance(item, Rule) else item for item in value]
            return dict(vars(value)) if isinstance(value, StageTrain) else value

        def section(name: str) -> dict[str, Any]:
            values, later = vars(getattr(self, name)), _LATER.get(name, {})
            if name == "first_stage" and self.first_stage.layers:
                later = {}
            return {k: plain(v) for k, v in values.items() if k not in later or v != later[k]}

        return {
            "name": self.name,
            "layers": [rule(r) for r in self.layers],
            **({} if self.attention == Attention() else {"attention": section("attention")}),
            "tbs": None if self.tbs is None else section("tbs"),
            **({} if self.refine is None else {"refine": section("refine")}),
            **{key: section(key) for key in ("distill", "train", "sampler", "store")},
            **({} if self._has_whole_first_stage else {"first_stage": section("first_stage")}),
        }

    @property
    def _has_whole_first_stage(self) -> bool:
        return self.first_stage == _first_stage_before(self.store.float)

    def to_yaml(self) -> str:
        """:meth:`to_json` as YAML."""
        return yaml.safe_dump(self.to_json(), sort_keys=False)

    def override(self, section: str, **values: Any) -> Recipe:
        """Copy with values of one section replaced, None leaving one alone; BidmError if out of range."""
        changed = {key: value for key, value in values.items() if value is not None}
        types_of = hints(type(getattr(self, section)))
        for key, value in changed.items():
            check_value(f"{section}.{key}", types_of[key], value)
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **changed)})

    def where(self, key: str, line: int = 0) -> str:
        """ "file, line n" of a section, of a key ("train.steps") or of a rule, for messages."""
        line = line or self.lines.get(key) or self.lines.get(key.partition(".")[0], 0)
        return f"{self.source}, line {line}" if line else self.source


def available() -> list[str]:
    """Names of the recipes that come with bidm."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
