"""Words: retired names, docstring openings and "a" for per, over source and prose.

    python tests/test_retired_names.py            # every violation, and counts per room
    python tests/test_retired_names.py bidm_cli/distill README.md

The table of retired words is :data:`RETIRED`; the terms to use are in CONTRIBUTING.md's glossary.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("bidm_cli", "cupy_kernels", "benchmarks")
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs")


@dataclass(frozen=True)
class Retired:
    """A retired word or phrase, and the term to use.

    Attributes:
        say: the term to use instead.
        name: regex for a whole identifier split into words by "_" ("student_told", "_pack_cell"); or None.
        module: regex for a whole module name; or None.
        text: regex searched in docstrings, comments, messages and prose; or None.
        only: path prefixes where it is retired; empty for everywhere.
        allowed: path prefixes where it is right.
        context: regex of text around it with which it is right.
    """

    say: str
    name: str | None = None
    module: str | None = None
    text: str | None = None
    only: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    context: str | None = None

    def applies(self, path: str) -> bool:
        """True if the word is retired in the file ``path``."""
        return (not self.only or path.startswith(self.only)) and not path.startswith(self.allowed or "\0")


def word(*words: str) -> str:
    """Regex for an identifier that has one of ``words`` among its parts."""
    return rf"(?:.*_)?(?:{'|'.join(words)})(?:_.*)?"


CPU, GPU = "bidm_cli/packed/cpu/", "cupy_kernels/"
RAM = (
    "bidm_cli/report/", "bidm_cli/sampling/gpu_memory.py", "bidm_cli/cli/bench.py", "bidm_cli/packed/",
    "bidm_cli/data/", "bidm_cli/networks/stored_precision.py", GPU, "benchmarks/",
)  # fmt: skip

RETIRED = (
    Retired("condition, or: gets, takes, is given", word("told"), text=r"\btold\b"),
    Retired("condition, options, path: the thing's own name", r"_*given(?:_.*)?|.*_given"),
    Retired("teacher targets, batch", word("lessons?"), "lessons?", r"\blessons?\b"),
    Retired(
        "fixed batch", word("lanes?"), "lanes?", r"\blanes?\b",
        allowed=(CPU, GPU, "bidm_cli/packed/format/bits.py", "bidm_cli/packed/cpu"),
    ),
    Retired("thread heuristic, other images of the batch", word("company"), "company", r"\bcompany\b"),
    Retired(
        "threads", r"_*teams?", "team", r"\bteams?\b",
        context=r"OpenMP|threads?|TeamHeuristic",
    ),
    Retired("kernel arguments", word("jobs?"), "jobs?", r"\bjobs?\b"),
    Retired("shortcut map", r"_pack_cell", "cells?"),
    Retired("concat load, or the thing's own name", module="parts?"),
    Retired("prefetch", word("ahead"), "ahead", r"\bahead\b(?! of)"),
    Retired("carried features", r"_*memory|_*memories", text=None, allowed=RAM),
    Retired(
        "carried features", text=r"\bmemory\b",
        only=("bidm_cli/binary/", "bidm_cli/distill/", "bidm_cli/diffusion/", "bidm_cli/networks/"),
        allowed=("bidm_cli/networks/stored_precision.py",),
        context=r"(?:GPU|peak|main|in|into|of|without|takes?|no|real) memory\b|memory[ -](?:format|mapped)",
    ),
    Retired(
        "carried features", text=r"\b(?:without|step of|renews? the|fills|rows without) memory\b",
        only=("bidm_cli/binary/", "bidm_cli/distill/", "bidm_cli/diffusion/", "README.md", "docs/"),
    ),
    Retired("restore_layout", r"_*as_given"),
    Retired("layout", module="integer_layers?"),
    Retired("Clipping", r"Limits"),
    Retired("EpilogueInputs", r"Extras"),
    Retired("PaddingCorrection", r"Borders"),
    Retired("CheckpointOptions", r"Reading|for_opening", only=("bidm_cli/cli/", "bidm_cli/checkpoints/")),
    Retired("check_same_run", r"keep_model|keep_conditions"),
    Retired("popcount", module="count", only=(CPU,)),
    Retired("matmul", module="multiply", only=(CPU,)),
    Retired("conv (host side)", module="plan", only=(CPU,)),
    Retired("blend", word("mix"), "mix|mix_kernel", only=("bidm_cli/packed/",)),
    Retired(
        "sequence, CpuGraph", word("programs?"), "program|cpu_program|program_kernel",
        only=("bidm_cli/packed/",),
    ),
    Retired("denoiser, capture and replay", module="recorded_step"),
    Retired("virtual (inputs)", r"Lazy|reads_lazily", module="lazy"),
    Retired(
        "plain English", text=r"\b(?:whoever|in vain|so many by so many|whence|thereof|naught|hitherto)\b",
    ),
)  # fmt: skip

QUESTION = re.compile(r"(?:What|How|Where|Which|Whether|Who|Whoever|When|Why)\b")
_COUNTED = (
    "(?:input |output )?channel|level|machine|layer|image|step|file|line|pixel|filter|row|head|batch|block|"
    "side|token|element|tile|sample|band|core|clock|cycle|thread|call|process|run|shape|class|group|timestep|"
    "prompt|word|byte|tap|position|cell|variant|score|output|input|output pixel|input element|output element"
)
_AMOUNT = (
    r"one|once|twice|two|three|four|\d+(?:\.\d+)?|half|all|tenth|time|share|sum|sign|student|object|method|"
    r"variable|row|run|s|ms|us|seconds?|bytes?|bits?|operations?|[KMG]iB|words?|times|filters?|channels|images|"
    r"rows|steps|factors?|offsets?|scales?|thresholds?|compares?|multiplications?|pass"
)
_NOT_AFTER = "of|that|whose|has|is|gets|which|with"
PER = re.compile(rf"\b(?:{_AMOUNT}) an? (?:{_COUNTED})\b(?! (?:{_NOT_AFTER})\b)", re.IGNORECASE)
"""An amount, "a", and what it is counted by: "one a level"; "one a file of" is something else."""


@dataclass(frozen=True)
class Violation:
    """A place and what is wrong with it."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def check_text(text: str, path: str, line: int) -> Iterator[Violation]:
    """Violations in prose that begins on ``line``."""
    for rule in RETIRED:
        if rule.text is None or not rule.applies(path):
            continue
        for match in re.finditer(rule.text, text, re.IGNORECASE):
            around = text[max(0, match.start() - 80) : match.end() + 80]
            if rule.context is None or not re.search(rule.context, around):
                at = line + text.count("\n", 0, match.start())
                yield Violation(path, at, f"text {match[0]!r}: say {rule.say}")
    for match in PER.finditer(text.replace("\n", " ")):
        at = line + text.count("\n", 0, match.start())
        yield Violation(path, at, f"text {match[0]!r}: say per")


def check_python(source: str, path: str) -> Iterator[Violation]:
    """Violations in a module's names, docstrings, comments and messages."""
    tree = ast.parse(source)
    yield from check_module_name(path)
    yield from check_docstrings(tree, path)
    yield from check_names(tree, path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\w \w", node.value):
            yield from check_text(node.value, path, node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from check_text(token.string, path, token.start[0])


def check_module_name(path: str) -> Iterator[Violation]:
    """Violation if the module, or a folder on its path, has a retired name."""
    for part in Path(path).with_suffix("").parts:
        for rule in RETIRED:
            if rule.module and rule.applies(path) and re.fullmatch(rule.module, part):
                yield Violation(path, 1, f"module {part!r}: say {rule.say}")


def check_names(tree: ast.Module, path: str) -> Iterator[Violation]:
    """Violations among the names that the module binds: functions, classes, arguments, variables, fields."""
    for node in ast.walk(tree):
        for name in _bound(node):
            for rule in RETIRED:
                if rule.name and rule.applies(path) and _matches(rule.name, name):
                    yield Violation(path, node.lineno, f"name {name!r}: say {rule.say}")  # type: ignore[attr-defined]
        if isinstance(node, ast.arg) and node.arg == "rows" and _is_condition(node.annotation):
            yield Violation(path, node.lineno, "name 'rows' for conditions: say condition, conditions")


def _is_condition(annotation: ast.expr | None) -> bool:
    return annotation is not None and bool(re.search(r"\bCondition(?:Set)?\b", ast.unparse(annotation)))


def _bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).rpartition(".")[2]


def _matches(pattern: str, name: str) -> bool:
    """True if the pattern matches the name as written, or its words: TeacherLesson as teacher_lesson."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return any(re.fullmatch(pattern, form) for form in (name, words))


def check_docstrings(tree: ast.Module, path: str) -> Iterator[Violation]:
    """Violations of the rules for docstrings: public ones exist, and none opens with a question word."""
    if tree.body and not ast.get_docstring(tree):
        yield Violation(path, 1, "module without a docstring")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text and QUESTION.match(text.lstrip()):
            line = node.body[0].lineno
            yield Violation(path, line, f"docstring opens with {text.split()[0]!r}: {text.splitlines()[0]}")
    for node in tree.body:
        public = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):  # type: ignore[arg-type]
            yield Violation(path, node.lineno, f"{node.name} is public, without a docstring")  # type: ignore[attr-defined]


def check_markdown(text: str, path: str) -> Iterator[Violation]:
    """Violations in prose outside fenced code."""
    prose = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    yield from check_text(prose, path, 1)


def check_file(file: Path) -> list[Violation]:
    """All violations in a .py or .md file of this repository, each once."""
    path, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
    found = check_python(text, path) if file.suffix == ".py" else check_markdown(text, path)
    return sorted(set(found), key=lambda v: (v.line, v.what))


def files_of(place: str) -> list[Path]:
    """Checked files of a folder or path: Python and Markdown, without results of measurements."""
    root = ROOT / place
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    return [f for f in files if f.suffix in (".py", ".md") and "results" not in f.relative_to(ROOT).parts]


def rooms() -> dict[str, list[Path]]:
    """Checked files by room: the folders of bidm_cli, its own files, the other sources, the prose."""
    found: dict[str, list[Path]] = {}
    for place in (*SOURCES, *PROSE):
        for file in files_of(place):
            parts = file.relative_to(ROOT).parts
            room = "/".join(parts[:2]) if parts[0] == "bidm_cli" and len(parts) > 2 else parts[0]
            found.setdefault(room, []).append(file)
    return found


@pytest.mark.parametrize("room", rooms())
def test_words(room: str) -> None:
    found = [str(violation) for file in rooms()[room] for violation in check_file(file)]
    assert not found, "\n".join([f"{len(found)} in {room}:", *found])


PLANTED = {
    '"""Module."""\n\ndef f(told):\n    """Return it."""\n': "name 'told'",
    '"""Module."""\n\ndef _f(student_told):\n    pass\n': "name 'student_told'",
    '"""Module."""\n\nclass NextLesson:\n    """Batch."""\n': "name 'NextLesson'",
    '"""What kernels take."""\n': "opens with 'What'",
    '"""Module."""\n\ndef f():\n    """Whether it is so."""\n': "opens with 'Whether'",
    '"""Module."""\n\ndef f():\n    pass\n': "f is public",
    "x = 1\n": "module without a docstring",
    '"""Module, with one scale a\nchannel."""\n': "say per",
    '"""Module."""\nraise ValueError("compiled once a machine")\n': "say per",
    '"""Module."""\nx = 1  # the next lesson\n': "text 'lesson'",
    '"""Module."""\n\ndef _f(rows: ConditionSet):\n    pass\n': "name 'rows'",
    '"""Module."""\n\ndef _f(memory):\n    pass\n': "name 'memory'",
    '"""Module."""\nsplit_in_lanes = 1\n': "name 'split_in_lanes'",
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_violation_is_found(source: str) -> None:
    assert any(PLANTED[source] in str(v) for v in check_python(source, "bidm_cli/distill/planted.py"))


RIGHT = {
    '"""SIMD lanes of a vector."""\nlanes = 16\n': "bidm_cli/packed/cpu/codegen/vector.py",
    '"""Peak memory of a process."""\nmemory = 1\n': "bidm_cli/report/bench/memory.py",
    '"""Kernels in one OpenMP team."""\n': "bidm_cli/packed/cpu/runtime/threads.py",
    '"""A path given by the user; one scale per channel; one of a layer\'s."""\n': "bidm_cli/files.py",
    '"""Weights in the memory format of a layer."""\n': "bidm_cli/networks/layers.py",
}


@pytest.mark.parametrize("source", RIGHT)
def test_a_word_is_left_alone_where_it_is_right(source: str) -> None:
    assert list(check_python(source, RIGHT[source])) == []


def test_module_names_and_prose() -> None:
    assert list(check_python('"""Parts."""\n', "bidm_cli/packed/cpu/parts.py"))
    assert list(check_markdown("Kernels are told so.\n", "docs/x.md"))
    assert not list(check_markdown("Text.\n```\ntold = 1\n```\n", "docs/x.md"))


def main(places: list[str]) -> None:
    """Print every violation in ``places`` (default: all), then counts per room."""
    total: Counter[str] = Counter()
    chosen = {place: files_of(place) for place in places} if places else rooms()
    for room, files in chosen.items():
        for file in files:
            for violation in check_file(file):
                total[room] += 1
                print(violation)
    for room in chosen:
        print(f"{total[room]:5d} {room}")
    print(f"{sum(total.values()):5d} in all")


if __name__ == "__main__":
    main(sys.argv[1:])
