"""Run ``bidm`` as a user does: what it printed, and the one line it failed with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bidm_cli.cli.main import main

DEMO = Path(__file__).resolve().parents[2] / "bidm_cli" / "demo"
SHARED = Path(__file__).resolve().parents[3] / "shared"


@dataclass(frozen=True)
class Ran:
    """Exit status, standard output and standard error."""

    status: int
    out: str
    err: str


class Runner:
    """``runner("inspect", path)``; nothing else of the process is touched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ran:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["bidm", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = self.capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    def fails(self, *arguments: object) -> str:
        """The error line of a run that must fail with status 1 and print nothing else."""
        ran = self(*arguments)
        assert ran.status == 1, ran.out + ran.err
        lines = [line for line in ran.err.splitlines() if not line.startswith("...")]
        assert len(lines) == 1 and lines[0].startswith("Error: "), ran.err
        return lines[0]
