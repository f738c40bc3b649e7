"""``--threads``, the cores a process may use, and what OpenMP is told before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bidm_cli.cli import threads
from tests.cli.running import DEMO, Runner
from tests.report.models import packed_of, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bidm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def in_new_process(program: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


SETTLED = """
import os
from bidm_cli.cli.threads import settle_openmp
settle_openmp()
import torch
print(torch.get_num_threads(), os.environ.get("GOMP_SPINCOUNT"))
"""


def test_what_the_user_left_open_is_chosen_before_torch() -> None:
    assert in_new_process(SETTLED) == f"{threads.available_cores()} {threads.SPINS}"
    assert in_new_process(SETTLED, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="7") == "1 7"
    assert in_new_process(SETTLED, OMP_WAIT_POLICY="active").endswith(" None")


def test_a_quota_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    assert threads.available_cores() == 8
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert threads.available_cores() == 3
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.available_cores() == 8
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("50000", 1), ("200000", 2), ("-1", 8)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert threads.available_cores() == cores


def test_commands_compute_with_the_threads_asked_for(
    bidm: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        for count in (2, 1):
            ran = bidm("inspect", DEMO / "digits.pth", "--threads", count)
            assert ran.status == 0, ran.err
            assert torch.get_num_threads() == count and os.environ["OMP_NUM_THREADS"] == str(count)
        assert bidm("sample", DEMO / "digits.pth", "--threads", 0).status == 2
    finally:
        torch.set_num_threads(before)


def test_the_same_seed_and_threads_give_the_same_bytes(
    bidm: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    packed_of(tiny(), tmp_path / "m.bidm")
    drawn = []
    try:
        for name in ("a", "b"):
            options = ("-n", 3, "--steps", 3, "--threads", 2, "--raw", "--out", tmp_path / name)
            ran = bidm("sample", tmp_path / "m.bidm", *options)
            assert ran.status == 0, ran.err
            drawn.append((tmp_path / name / "samples.npy").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert drawn[0] == drawn[1]


def test_help_and_import_need_no_torch() -> None:
    program = "import sys, bidm_cli.cli.main as m; m.cli(['--help'], standalone_mode=False)"
    assert in_new_process(program + "; print('torch' in sys.modules)").endswith("False")
    assert in_new_process("import sys, bidm_cli; print('torch' in sys.modules)") == "False"
