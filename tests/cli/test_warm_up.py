"""The line about compiling kernels: there with a cold cache, not with a warm one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bidm_cli.packed.cpu.ops import warm_up
from tests.report.models import packed_of, tiny

ROOT = Path(__file__).resolve().parents[2]


def test_told_when_kernels_are_fresh_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    warm_up.compile_all()
    warm_up.compile_all(said.append)
    assert said == []
    monkeypatch.setattr(warm_up, "norm_launcher", lambda: warm_up.FRESH.append("norm"))
    warm_up.compile_all(said.append)
    assert said[0] == "compiling kernels for this machine, once:" and len(said) == 2
    assert "".join(said).endswith(" s\n")


@pytest.mark.slow
def test_a_cold_cache_is_told_once(tmp_path: Path) -> None:
    packed_of(tiny(), tmp_path / "m.bidm")
    program = "from bidm_cli.cli.main import main; main()"
    command = [sys.executable, "-c", program, "sample", str(tmp_path / "m.bidm"), "-n", "1", "--steps", "1"]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for expected in (1, 0):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / f"out{expected}")],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.count("compiling kernels for this machine, once: ") == expected, done.stderr
