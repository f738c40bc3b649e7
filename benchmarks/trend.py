"""One measurement over commits, from the rows that the benchmarks append (benchmarks/record.py).

python benchmarks/trend.py cpu_unet                     # names of the measurements
python benchmarks/trend.py cpu_unet "LDM-4"             # those with LDM-4 in their name
python benchmarks/trend.py cpu_unet LDM-4 --numbers packed_seconds ratio
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS

from bidm_cli.report.pages.tables import Table


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a file in order of date, those of a day in order of the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return sorted(rows, key=lambda row: row["date"])


def trend(name: str, rows: Sequence[dict[str, Any]], wanted: Sequence[str] = ()) -> Table:
    """One row per record of a measurement, with the change of each number against the record before."""
    numbers = list(wanted) or list(dict.fromkeys(key for row in rows for key in row["numbers"]))
    lines = []
    before: dict[str, Any] = {}
    for row in rows:
        values = [_text(row["numbers"].get(key), before.get(key)) for key in numbers]
        machine = ", ".join(str(value) for value in row["machine"].values())
        lines.append((row["date"], row["commit"], *values, machine))
        before = row["numbers"]
    columns = ["date", "commit", *numbers, "machine"]
    return Table(name, columns, lines, frozenset({0, 1, len(columns) - 1}))


def _text(value: Any, before: Any) -> str:
    if not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    change = ""
    if isinstance(before, (int, float)) and before:
        change = f" ({100 * (value - before) / before:+.0f} %)"
    return f"{value:.4g}{change}"


def main() -> None:
    """Print the measurements of a page over time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("page", help="a name in benchmarks/results, or a .jsonl file")
    parser.add_argument("measurement", nargs="?", help="part of a measurement's name")
    parser.add_argument("--numbers", nargs="+", default=[], help="only these")
    options = parser.parse_args()
    path = Path(options.page)
    rows = rows_of(path if path.suffix == ".jsonl" else RESULTS / f"{options.page}.jsonl")
    names = list(dict.fromkeys(row["measurement"] for row in rows))
    if options.measurement is None:
        print("\n".join(names))
        return
    for name in (name for name in names if options.measurement in name):
        chosen = [row for row in rows if row["measurement"] == name]
        print(trend(name, chosen, options.numbers).to_text() + "\n")


if __name__ == "__main__":
    main()
