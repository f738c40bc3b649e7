"""Results of benchmarks as JSON rows: one line per measurement in benchmarks/results/NAME.jsonl.

    record(RESULTS / "cpu_unet.jsonl", {"LDM-4, batch 1": {"packed_seconds": 0.15, "ratio": 9.4}})

Every row holds the commit ("-dirty" if tracked files differ from it), the date, the machine and the command.
benchmarks/trend.py prints one measurement over commits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bidm_cli.packed.cpu.codegen.isa import cpu_model, instruction_set

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def record(path: Path, measurements: Mapping[str, Mapping[str, Any]], **machine: Any) -> None:
    """Append one row per measurement; ``machine`` adds to CPU model, instruction set and cores."""
    shared = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_model(), "isa": instruction_set(), "cores": os.cpu_count(), **machine},
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], HERE.parent), *sys.argv[1:]]),
    }
    with open(path, "a", encoding="utf-8") as file:
        for name, numbers in measurements.items():
            file.write(json.dumps({"measurement": name, **shared, "numbers": dict(numbers)}) + "\n")


def commit() -> str:
    """Short hash of the checkout's commit, "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def add_record_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add ``--record``: the file to append rows to, by default benchmarks/results/NAME.jsonl."""
    default = RESULTS / f"{name}.jsonl"
    parser.add_argument(
        "--record", nargs="?", type=Path, const=default, help="append the numbers as JSON rows"
    )
