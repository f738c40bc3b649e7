"""Tables of benchmarks/results/ablation.jsonl as benchmarks/results/ablation.md: mean and spread over seeds.

python benchmarks/ablation_page.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from ablation_recipes import MAIN
from record import RESULTS

ROWS, PAGE = RESULTS / "ablation.jsonl", RESULTS / "ablation.md"
COLUMNS = {
    "trajectory_error": ("trajectory error", "{:.4f}"),
    "free_error": ("free error", "{:.3f}"),
    "fd_data": ("FD to data", "{:.1f}"),
    "fd_teacher": ("FD to the original", "{:.1f}"),
    "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"),
    "file_bytes": ("bytes", "{:,.0f}"),
    "storage_ratio": ("storage", "{:.1f}x"),
    "ops_ratio": ("operations", "{:.1f}x"),
}
TITLE = "# Ablation: what each part is worth"
MARK = "<!-- tables, by benchmarks/ablation_page.py -->"
Numbers = dict[str, Any]


def latest(lines: list[str]) -> dict[str, dict[str, Numbers]]:
    """Domain to measurement to numbers; a later line replaces an earlier one."""
    found: dict[str, dict[str, Numbers]] = defaultdict(dict)
    for line in lines:
        row = json.loads(line)
        found[row["machine"]["domain"]][row["measurement"]] = row["numbers"]
    return found


def cell(values: list[float], form: str) -> str:
    """Mean, and half of the range where there are several."""
    if not values:
        return ""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return form.format(mean) + (f" ± {form.format(half)}" if half else "")


def table(rows: dict[str, Numbers]) -> list[str]:
    """Markdown of one domain: the original, the main variants, the others by their FD."""
    groups: dict[tuple[str, int], list[Numbers]] = defaultdict(list)
    for name, numbers in rows.items():
        if name != "original":
            groups[(numbers["variant"], numbers["steps"])].append(numbers)
    order = list(MAIN)

    def place(key: tuple[str, int]) -> tuple[int, float]:
        known = order.index(key[0]) if key[0] in order else len(order)
        return known, sum(row["fd_data"] for row in groups[key]) / len(groups[key])

    head = ["student", "steps", "seeds", *(title for title, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if "original" in rows:
        original = [cell([rows["original"][key]] if key in rows["original"] else [], form)
                    for key, (_, form) in COLUMNS.items()]  # fmt: skip
        lines.append("| " + " | ".join(["original", "", "", *original]) + " |")
    for key in sorted(groups, key=place):
        found = groups[key]
        cells = [cell([row[name] for row in found], form) for name, (_, form) in COLUMNS.items()]
        seeds = ", ".join(str(row["seed"]) for row in found)
        lines.append("| " + " | ".join([key[0], f"{key[1]:,}", seeds, *cells]) + " |")
    return lines


def main() -> None:
    """Write the tables below the mark; what stands above it is kept."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"{TITLE}\n\n{MARK}\n"
    parts = [text.partition(MARK)[0] + MARK]
    for domain, rows in latest(ROWS.read_text(encoding="utf-8").splitlines()).items():
        parts.append(f"\n## {domain}\n\n" + "\n".join(table(rows)))
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
