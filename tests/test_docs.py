"""Documentation against the code: recipe keys, command options, named files, versions.

python tests/test_docs.py        # writes docs/cli.md anew from the commands
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import bidm_cli
from bidm_cli.cli.main import COMMANDS
from bidm_cli.networks.layers import ROLES
from bidm_cli.recipe import Attention, Connections, Distill, FirstStage, Sampler, StageTrain, Store, Train
from bidm_cli.recipe.spec import BinarySpec

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "bidm_cli/**/*.md", "cupy_kernels/*.md")
    for page in ROOT.glob(pattern)
)
SECTIONS = {
    "binarize": BinarySpec, "attention": Attention, "tbs": Connections, "distill": Distill, "train": Train,
    "sampler": Sampler, "store": Store, "first_stage": FirstStage,
    "first_stage.train": StageTrain,
}  # fmt: skip
CLI = ROOT / "docs" / "cli.md"


def documented(section: str) -> dict[str, str]:
    """Defaults by key, as docs/recipes.md has them."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    level = "###" if section == "binarize" or "." in section else "##"
    body = re.split(r"^#+ ", text.partition(f"\n{level} {section}\n")[2],
                    flags=re.MULTILINE)[0]  # fmt: skip
    return dict(re.findall(r"^\| `(\w+)` \| [^|]* \| `([^`]*)` \|", body, re.MULTILINE))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_recipe_key_is_documented_with_its_default(section: str) -> None:
    found = documented(section)
    # Rules and a section of its own have no default that fits in a cell.
    nested = ("layers", "train")
    fields = dataclasses.fields(SECTIONS[section])
    defaults = {field.name: field.default for field in fields if field.name not in nested}
    assert found.keys() == defaults.keys()
    for key, default in defaults.items():
        if isinstance(default, tuple):
            (default,) = default
        assert (float(found[key]) if isinstance(default, float) else found[key]) == (
            default if isinstance(default, float) else str(default)
        )


def test_every_role_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"| `{role}` | {meaning} |" in text for role, meaning in ROLES.items())


def option_rows(command: click.Command) -> Iterator[str]:
    """Rows of the table of a command's arguments and options."""
    context = click.Context(command, info_name=command.name)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            continue
        record = parameter.get_help_record(context)
        if record is not None:
            names, meaning = (" ".join(text.split()).replace("|", "\\|") for text in record)
            yield f"| `{names}` | {meaning} |"


def cli_page() -> str:
    """docs/cli.md, from the commands themselves."""
    lines = ["# Command reference", "", "Made from the commands by `python tests/test_docs.py`."]
    lines += ["`bidm --debug COMMAND ...` shows tracebacks in place of one-line errors.", ""]
    for name, summary in COMMANDS.items():
        command = importlib.import_module(f"bidm_cli.cli.{name}").command
        usage = command.get_usage(click.Context(command, info_name=f"bidm {name}"))
        lines += [f"## bidm {name}", "", summary, "", "```", usage.removeprefix("Usage: "), "```", ""]
        paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
        for paragraph in paragraphs:
            code = "\b" in paragraph
            text = paragraph.replace("\b\n", "").rstrip()
            lines += (
                ["```", *(line.removeprefix("  ") for line in text.splitlines()), "```"] if code else [text]
            )
            lines.append("")
        rows = list(option_rows(command))
        lines += ["| option | meaning |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    """Names and help; the rest of a row is worded by click, by its version."""
    section = CLI.read_text(encoding="utf-8").partition(f"## bidm {name}\n")[2].partition("\n## ")[0]
    for parameter in importlib.import_module(f"bidm_cli.cli.{name}").command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            text = " ".join((parameter.help or "").split("  [")[0].split())
            row = re.search(rf"^\| `[^|]*{re.escape(parameter.opts[0])}\b.*$", section, re.MULTILINE)
            assert row and text in row[0], f"{parameter.opts[0]}: run python tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_source_files_exist(page: Path) -> None:
    """Paths such as `sampling/sample.py`; NAME and braces stand for several."""
    for path in re.findall(r"`([\w./-]+\.(?:py|cu|cuh|yaml|md))`", page.read_text(encoding="utf-8")):
        if "NAME" in path or "/" not in path:
            continue
        homes = (
            ROOT,
            ROOT / "bidm_cli",
            ROOT / "bidm_cli" / "packed",
            ROOT / "bidm_cli" / "packed" / "cpu",
            page.parent,
        )
        assert any((home / path).exists() for home in homes), path


def test_one_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{bidm_cli.__version__}"\n' in project
    assert f"## [{bidm_cli.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    CLI.write_text(cli_page(), encoding="utf-8")
