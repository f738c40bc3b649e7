"""Run bidm commands, given as JSON on standard input, in this one process; compare_checkouts.py starts it.

One process because importing torch takes longer than most of the commands. Exit codes and standard error go
to commands.json, by command. Without commands, the recipes are written to the working directory.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from compared_commands import RECIPES

import bidm_cli
from bidm_cli.cli.main import main


def run(command: str) -> dict[str, Any]:
    """Exit code and message of one command; an exception that main() lets through is a code of its own."""
    errors, code = io.StringIO(), 0
    sys.argv = ["bidm", *shlex.split(command)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except Exception as error:
            code, message = f"crash: {type(error).__name__}", str(error)
            errors.write(message)
    lines = [line for line in errors.getvalue().splitlines() if "compiling kernels" not in line]
    return {"code": code, "message": " ".join(" ".join(lines).split())[-300:]}


def write_recipes(folder: Path) -> None:
    """Each recipe as it is (.json, to be compared), and with less to measure and draw (.yaml, to be used)."""
    for name in RECIPES:
        values = bidm_cli.Recipe.load(name).to_json()
        (folder / f"{name}.json").write_text(json.dumps(values))
        values["sampler"]["steps"] = values["train"]["synthetic_steps"] = 8
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


if __name__ == "__main__":
    print(bidm_cli.__file__)
    commands = json.load(sys.stdin)
    if not commands:
        write_recipes(Path())
    log = {command: run(command) for command in commands}
    Path("commands.json").write_text(json.dumps(log, indent=1))
