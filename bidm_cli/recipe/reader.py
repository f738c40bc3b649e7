"""YAML reader of recipes, with the line in every error message."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import ROLES
from bidm_cli.recipe.bounds import check_value, hints, plain_types
from bidm_cli.recipe.sections import Attention, Connections, Distill, FirstStage, Rule, Sampler, Store, Train
from bidm_cli.recipe.spec import BinarySpec, Refine


def read(text: str, source: str) -> dict[str, Any]:
    """Fields of a :class:`bidm_cli.recipe.recipe.Recipe` from YAML text.

    Raises:
        BidmError: not YAML, an unknown key, a wrong value; with ``source`` and the line.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or "not YAML"
        raise BidmError(f"{source}, line {line}: {problem}; mend the YAML there") from error
    return RecipeReader(source).recipe(node)


class RecipeReader:
    """Converter of YAML nodes, which know their lines, to the sections' dataclasses."""

    SECTIONS: typing.ClassVar[dict[str, type]] = {
        "attention": Attention,
        "tbs": Connections,
        "refine": Refine,
        "distill": Distill,
        "train": Train,
        "sampler": Sampler,
        "store": Store,
        "first_stage": FirstStage,
    }

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[str, int] = {}

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

    def strings(self, node: yaml.Node | None) -> tuple[str, ...]:
        if node is None:
            return ()
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(str(self.plain(n)) for n in nodes)

    def recipe(self, node: yaml.Node | None) -> dict[str, Any]:
        """Fields of a :class:`bidm_cli.recipe.recipe.Recipe`."""
        parts = self.mapping(node, "the recipe", ["name", "layers", *self.SECTIONS])
        for key in ("name", "layers"):
            if key not in parts:
                self.fail(node, f"the recipe needs a {key!r}")
        sections = {
            key: self.section(parts[key], key, kind) for key, kind in self.SECTIONS.items() if key in parts
        }
        return {
            "name": str(self.plain(parts["name"])),
            "layers": self.rules(parts["layers"], "layers"),
            "source": self.source,
            "lines": self.lines | {key: value.start_mark.line + 1 for key, value in parts.items()},
            **sections,
        }

    def rules(self, node: yaml.Node, what: str) -> tuple[Rule, ...]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, f"'{what}' must be a list of rules, such as {{role: stem, keep: float}}")
        return tuple(self.rule(rule) for rule in node.value)

    def rule(self, node: yaml.Node) -> Rule:
        parts = self.mapping(node, "a rule", ["role", "name", "keep", "binarize"])
        if ("keep" in parts) == ("binarize" in parts):
            self.fail(node, "a rule says either 'keep: float' or 'binarize: {...}'")
        if "role" not in parts and "name" not in parts:
            self.fail(node, "a rule needs a 'role' or a 'name' pattern")
        if "keep" in parts and self.plain(parts["keep"]) != "float":
            self.fail(parts["keep"], "'keep' takes 'float'")
        roles = self.strings(parts.get("role"))
        for role in roles:
            if role != "*" and role not in ROLES:
                self.fail(parts["role"], f"unknown role {role!r}; one of *, {', '.join(ROLES)}")
        names = self.strings(parts.get("name"))
        spec = self.section(parts["binarize"], "binarize", BinarySpec) if "binarize" in parts else None
        return Rule(roles, names, spec, node.start_mark.line + 1)

    def section(self, node: yaml.Node, what: str, kind: type) -> Any:
        if kind in (Connections, Refine) and node.tag == "tag:yaml.org,2002:null":
            return None
        types_of = hints(kind)
        parts = self.mapping(node, f"'{what}'", list(types_of))
        self.lines |= {f"{what}.{key}": value.start_mark.line + 1 for key, value in parts.items()}
        values = {key: self.value(part, f"{what}.{key}", types_of[key]) for key, part in parts.items()}
        try:
            return kind(**values)
        except ValueError as error:
            return self.fail(node, f"{what}: {error}")

    def value(self, node: yaml.Node, what: str, hint: Any) -> Any:
        if hint == tuple[Rule, ...]:
            return self.rules(node, what)
        if dataclasses.is_dataclass(hint):
            return self.section(node, what, typing.cast(type, hint))
        if typing.get_origin(hint) is tuple:
            return self.strings(node)
        value = self.convert(node, what, plain_types(hint))
        try:
            check_value(what, hint, value)
        except BidmError as error:
            self.fail(node, str(error))
        return value

    def convert(self, node: yaml.Node, what: str, options: Sequence[Any]) -> Any:
        """Value of a node as one of the types ``options``."""
        value = self.plain(node)
        for option in options:
            if typing.get_origin(option) is Literal:
                # The text as written: YAML 1.1 turns off, on and no into booleans.
                if isinstance(node, yaml.ScalarNode) and node.value in typing.get_args(option):
                    return node.value
            elif option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
                # YAML 1.1 reads 2e-5 as a string: it wants a dot.
                with contextlib.suppress(ValueError, OverflowError):
                    return float(value)
            elif type(value) is option:
                return value
        return self.fail(node, f"{what} is {value!r}; it takes {_shown(options)}")


def _shown(options: Sequence[Any]) -> str:
    words: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text"}
    return " or ".join(
        word for option in options for word in map(str, typing.get_args(option) or [words[option]])
    )
