"""Recipes: YAML that says which layers become binary, where connections go, and how to distil.

    recipe = Recipe.load("w1a1")            # by name, or a path
    recipe.train.steps

Every key is checked; an unknown key, a wrong value or a rule that matches nothing is an error with its line.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bidm_cli.binary.spec import BinarySpec
from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import ROLES

_HERE = Path(__file__).resolve().parent
FOLDERS = (_HERE / "recipes", _HERE.parent / "recipes")
"""Where recipes are found by name: inside the installed package, or beside it in a checkout."""


@dataclass(frozen=True)
class Rule:
    """One entry of ``layers``: which layers, and what they become.

    Attributes:
        roles: roles it takes ("*" takes all); empty means any.
        names: fnmatch patterns over the network's own names; empty means any.
        binarize: the binary layer's parts, or None to keep the layer float.
        line: where it stands in the file, 0 if it did not come from one.
    """

    roles: tuple[str, ...]
    names: tuple[str, ...]
    binarize: BinarySpec | None
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Connections:
    """``tbs``: where cross-timestep connections go, and how they are trained.

    Attributes:
        connect: "decoder[-8:]" (a stage and a slice of its blocks), fnmatch patterns over block names, or a
            list of these.
        initial: where beta starts. buckets: rows of its table over the timesteps.
        stride: timesteps between h_prev and h_t in training; "sampler" takes the sampler's own.
        pair: how the two training inputs come about. "ddim": x_t' noised from x0, x_t by one sampler step
            from it with the teacher's noise; "same_noise" and "independent" noise both from x0.
    """

    connect: tuple[str, ...] = ("decoder[-8:]",)
    initial: float = 0.3
    buckets: int = 100
    stride: int | Literal["sampler"] = "sampler"
    pair: Literal["ddim", "same_noise", "independent"] = "ddim"


@dataclass(frozen=True)
class Distill:
    """``distill``: the loss on features, its weight, and the target of the output.

    Attributes:
        loss: "spd" (Space Patched Distillation), "mse" on features, or "none".
        patches: p, the map is cut into p x p patches. weight: lambda.
        features: "blocks" for all of the network's blocks, or patterns as in ``tbs.connect``.
        target: "teacher" (its predicted noise) or "noise" (the noise that was added).
    """

    loss: Literal["spd", "mse", "none"] = "spd"
    patches: int = 4
    weight: float = 0.01
    features: tuple[str, ...] = ("blocks",)
    target: Literal["teacher", "noise"] = "teacher"


@dataclass(frozen=True)
class Train:
    """``train``: optimisation. ``lr_binary`` is the rate of latent binary weights, ``lr`` of all others."""

    steps: int = 200000
    batch_size: int = 4
    optimizer: str = "adamw"
    lr: float = 2.0e-5
    lr_binary: float = 2.0e-5
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 500
    ema: float = 0.9999
    clip: float = 1.0
    amp: Literal["auto", "off", "bfloat16", "float16"] = "auto"
    synthetic_images: int = 4096
    synthetic_steps: int = 50


@dataclass(frozen=True)
class Sampler:
    """``sampler``: what the student is trained for and sampled with by default."""

    name: Literal["ddim", "ddpm", "dpm++"] = "ddim"
    steps: int = 100
    eta: float = 0.0


@dataclass(frozen=True)
class Store:
    """``store``: float type of everything that is not a bit."""

    float: Literal["float16", "float32"] = "float16"


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; see the module's text. ``source`` is the file it came from, for messages."""

    name: str
    layers: tuple[Rule, ...]
    tbs: Connections | None = None
    distill: Distill = Distill()
    train: Train = Train()
    sampler: Sampler = Sampler()
    store: Store = Store()
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
            found = [folder / f"{name_or_path}.yaml" for folder in FOLDERS if path.name == str(name_or_path)]
            path = next((candidate for candidate in found if candidate.is_file()), path)
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
        """A recipe from YAML text.

        Raises:
            BidmError: as :meth:`load`.
        """
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            problem = getattr(error, "problem", None) or "not YAML"
            raise BidmError(f"{source}, line {line}: {problem}; mend the YAML there") from error
        return _Reader(source).recipe(node)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Read back :meth:`to_json`."""
        return cls.parse(yaml.safe_dump(values), "stored recipe")

    def to_json(self) -> dict[str, Any]:
        """The resolved recipe, every default written out."""

        def rule(r: Rule) -> dict[str, Any]:
            shown: dict[str, Any] = {}
            if r.roles:
                shown["role"] = list(r.roles)
            if r.names:
                shown["name"] = list(r.names)
            return shown | ({"keep": "float"} if r.binarize is None else {"binarize": r.binarize.to_json()})

        def section(values: Any) -> dict[str, Any]:
            shown = dataclasses.asdict(values)
            return {k: list(v) if isinstance(v, tuple) else v for k, v in shown.items()}

        return {
            "name": self.name,
            "layers": [rule(r) for r in self.layers],
            "tbs": None if self.tbs is None else section(self.tbs),
            **{key: section(getattr(self, key)) for key in ("distill", "train", "sampler", "store")},
        }

    def to_yaml(self) -> str:
        """:meth:`to_json` as YAML."""
        return yaml.safe_dump(self.to_json(), sort_keys=False)

    def override(self, section: str, **values: Any) -> Recipe:
        """A copy with values of one section replaced; None leaves a value alone."""
        given = {k: v for k, v in values.items() if v is not None}
        return dataclasses.replace(
            self, **{section: dataclasses.replace(getattr(self, section), **given)}
        )

    def where(self, key: str, line: int = 0) -> str:
        """ "file, line n" of a section or rule, for messages."""
        line = line or self.lines.get(key, 0)
        return f"{self.source}, line {line}" if line else self.source


def available() -> list[str]:
    """Names of the recipes that come with bidm."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})


class _Reader:
    """Turns YAML nodes, which know their lines, into the dataclasses above."""

    SECTIONS: typing.ClassVar[dict[str, type]] = {
        "tbs": Connections,
        "distill": Distill,
        "train": Train,
        "sampler": Sampler,
        "store": Store,
    }
    LISTS = ("connect", "features")

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, node: yaml.Node | None, message: str) -> typing.NoReturn:
        line = node.start_mark.line + 1 if node is not None else 1
        raise BidmError(f"{self.source}, line {line}: {message}")

    def mapping(self, node: yaml.Node | None, what: str, known: Sequence[str]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be a mapping with the keys {', '.join(known)}")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if key.value not in known:
                self.fail(key, f"unknown key {key.value!r} in {what}; it takes {', '.join(known)}")
            if key.value in found:
                self.fail(key, f"{key.value!r} is given twice in {what}")
            found[key.value] = value
        return found

    def plain(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, "expected a single value here")
        return yaml.constructor.SafeConstructor().construct_object(node)

    def strings(self, node: yaml.Node) -> tuple[str, ...]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(str(self.plain(n)) for n in nodes)

    def recipe(self, node: yaml.Node | None) -> Recipe:
        parts = self.mapping(node, "the recipe", ["name", "layers", *self.SECTIONS])
        for key in ("name", "layers"):
            if key not in parts:
                self.fail(node, f"the recipe needs a {key!r}")
        rules = parts["layers"]
        if not isinstance(rules, yaml.SequenceNode) or not rules.value:
            self.fail(rules, "'layers' must be a list of rules, such as {role: stem, keep: float}")
        sections = {
            key: None if self._is_null(parts[key]) and key == "tbs" else self.section(parts[key], key, kind)
            for key, kind in self.SECTIONS.items()
            if key in parts
        }
        return Recipe(
            name=str(self.plain(parts["name"])),
            layers=tuple(self.rule(rule) for rule in rules.value),
            source=self.source,
            lines={key: value.start_mark.line + 1 for key, value in parts.items()},
            **sections,  # type: ignore[arg-type]
        )

    @staticmethod
    def _is_null(node: yaml.Node) -> bool:
        return node.tag == "tag:yaml.org,2002:null"

    def rule(self, node: yaml.Node) -> Rule:
        parts = self.mapping(node, "a rule", ["role", "name", "keep", "binarize"])
        if ("keep" in parts) == ("binarize" in parts):
            self.fail(node, "a rule says either 'keep: float' or 'binarize: {...}'")
        if "role" not in parts and "name" not in parts:
            self.fail(node, "a rule needs a 'role' or a 'name' pattern")
        if "keep" in parts and self.plain(parts["keep"]) != "float":
            self.fail(parts["keep"], "'keep' takes 'float'")
        roles = self.strings(parts["role"]) if "role" in parts else ()
        for role in roles:
            if role != "*" and role not in ROLES:
                self.fail(parts["role"], f"unknown role {role!r}; one of *, {', '.join(ROLES)}")
        names = self.strings(parts["name"]) if "name" in parts else ()
        spec = self.section(parts["binarize"], "binarize", BinarySpec) if "binarize" in parts else None
        return Rule(roles, names, spec, node.start_mark.line + 1)

    def section(self, node: yaml.Node, what: str, kind: type) -> Any:
        types_of = typing.get_type_hints(kind)
        parts = self.mapping(node, f"'{what}'", list(types_of))
        values = {}
        for key, value in parts.items():
            if key in self.LISTS:
                values[key] = self.strings(value)
            else:
                values[key] = self.value(value, f"{what}.{key}", types_of[key])
        return kind(**values)

    def value(self, node: yaml.Node, what: str, wanted: Any) -> Any:
        value = self.plain(node)
        union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
        options = typing.get_args(wanted) if union else (wanted,)
        for option in options:
            if typing.get_origin(option) is Literal:
                # The text as written: YAML 1.1 turns off, on and no into booleans.
                if isinstance(node, yaml.ScalarNode) and node.value in typing.get_args(option):
                    return node.value
            elif option is float and isinstance(value, str):
                # YAML 1.1 reads 2e-5 as a string: it wants a dot.
                try:
                    return self.positive(node, what, float(value))
                except ValueError:
                    continue
            elif option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
                return self.positive(node, what, float(value))
            elif type(value) is option:
                return self.positive(node, what, value) if option is int else value
        self.fail(node, f"{what} is {value!r}; it takes {_shown(options)}")

    def positive(self, node: yaml.Node, what: str, number: Any) -> Any:
        least = 0 if what.split(".")[1] in _MAY_BE_ZERO else 1 if isinstance(number, int) else None
        if number != number or number in (float("inf"), float("-inf")):
            self.fail(node, f"{what} is {number}; it takes a finite number")
        if number < 0 or (least is not None and number < least):
            self.fail(node, f"{what} is {number}; it takes a number from {least or 0} up")
        return number


_MAY_BE_ZERO = ("warmup", "steps", "weight", "eta", "clip", "ema", "initial", "shortcut_init", "weight_decay")


def _shown(options: Sequence[Any]) -> str:
    shown = []
    for option in options:
        if typing.get_origin(option) is Literal:
            shown += [str(o) for o in typing.get_args(option)]
        else:
            shown.append({int: "a whole number", float: "a number", str: "a text"}.get(option, str(option)))
    return " or ".join(shown)
