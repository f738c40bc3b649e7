"""benchmarks/record.py and trend.py: JSON rows with commit and machine, and their trend."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_rows_and_their_trend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    record, trend = importlib.import_module("record"), importlib.import_module("trend")
    path = tmp_path / "some.jsonl"
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "some.py"), "--rounds", "3"])
    for number, commit in ((2.0, "aaaa"), (1.5, "bbbb")):
        monkeypatch.setattr(record, "commit", lambda commit=commit: commit)
        record.record(path, {"net, batch 1": {"seconds": number}, "other": {"kernel": "popc"}}, gpu="none")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["commit"] for row in rows] == ["aaaa", "aaaa", "bbbb", "bbbb"]
    assert rows[0]["command"] == "python benchmarks/some.py --rounds 3" and rows[0]["machine"]["cores"]
    monkeypatch.setattr(sys, "argv", ["trend.py", str(path), "net"])
    trend.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "net, batch 1" and "aaaa" in lines[4] and "bbbb" in lines[5]
    assert "1.5 (-25 %)" in lines[5] and "other" not in "".join(lines)


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_kept_rows_are_whole(path: Path) -> None:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"measurement", "commit", "date", "machine", "command", "numbers"} <= row.keys()
        assert row["machine"]["cpu"] and row["machine"]["cores"] and row["numbers"]
