"""No file of the package imports, over whatever detour, a file that imports it.

Counted are ordinary imports, those inside functions, those under TYPE_CHECKING, and module names in strings
that code imports by: ``import_module("pkg.module")``, "pkg.module:Name" and tables of such names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bidm_cli", "cupy_kernels")
NAMED = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?::\w+)?")


def sources() -> dict[str, str]:
    """Text of every module by its name; a package's name stands for its ``__init__``."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports."""
    graph = {}
    for name, text in texts.items():
        tree = ast.parse(text)
        targets = {target for node in ast.walk(tree) for target in _targets(node, name, texts)}
        graph[name] = targets - {name}
    return graph


def _targets(node: ast.AST, name: str, modules: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{name}: imports are absolute here"
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            if inside in modules:
                yield inside
            elif node.module in modules:
                yield node.module
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
        module = node.value.partition(":")[0]
        if module in modules:
            yield module


def cycles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            component = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.add(frozenset(component))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def test_no_file_imports_a_file_that_imports_it() -> None:
    assert not cycles(imports(sources()))


PLANTED = {
    "in a function": "def later():\n    from bidm_cli.packed.model import PackedModel\n",
    "under TYPE_CHECKING": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bidm_cli.packed.model\n"
    ),
    "a name in a table": 'CLASSES = {"packed": "bidm_cli.packed.model:PackedModel"}\n',
    "import_module": 'import importlib\nimportlib.import_module("bidm_cli.packed.model")\n',
    "the package": "from bidm_cli.packed import model\n",
}


@pytest.mark.parametrize("way", PLANTED)
def test_a_planted_cycle_is_found(way: str) -> None:
    """From a backend back to the model that runs on it."""
    texts = sources()
    texts["bidm_cli.packed.tensors"] += "\n" + PLANTED[way]
    new = cycles(imports(texts))
    assert len(new) == 1 and {"bidm_cli.packed.tensors", "bidm_cli.packed.model"} <= next(iter(new))


def test_the_graph_sees_what_is_imported_by_name() -> None:
    graph = imports(sources())
    assert "bidm_cli.packed.backends.numba" in graph["bidm_cli.packed.choose"]
    assert "bidm_cli.networks.dit" in graph["bidm_cli.networks.registry"]
    assert "bidm_cli.packed.recording.cpu_graph" in graph["bidm_cli.packed.recording.denoiser"]
    assert "bidm_cli.packed.format.read" in graph["bidm_cli"]


def test_no_room_below_the_command_line_names_its_options() -> None:
    """Library texts name arguments in backquotes; bidm_cli/cli/wording.py makes options of them."""
    assert not option_names(sources())
    planted = sources() | {"bidm_cli.sampling.sample": 'raise BidmError("give --label")\n'}
    assert option_names(planted) == ["bidm_cli.sampling.sample: give --label"]


def option_names(texts: dict[str, str]) -> list[str]:
    """String constants of bidm_cli with a command-line option, outside of its cli."""
    return [
        f"{name}: {node.value}"
        for name, text in texts.items()
        if name.startswith("bidm_cli") and not name.startswith("bidm_cli.cli")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<![\w-])--[a-z]", node.value)
    ]
