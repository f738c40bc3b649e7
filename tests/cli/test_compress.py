"""``bidm compress`` beyond what tests/distill and tests/end_to_end see: dry run, devices, resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture
def digits(bidm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bidm("demo", "demo").code == 0
    return tmp_path / "demo"


def arguments(digits, *more):
    return (
        "compress", digits / "digits.pth", "--recipe", digits / "digits-w1a1.yaml",
        "--data", digits / "digits.npz", "--batch-size", 2, *more,
    )  # fmt: skip


def test_dry_run_shows_layers_memory_and_time_and_writes_nothing(bidm, digits):
    before = set(digits.parent.rglob("*"))
    called = bidm(*arguments(digits, "--dry-run", "--steps", 7))
    assert called.code == 0, called.err
    for words in ("mid.attn_1.proj_out", "7 steps of 2", "memory", "per step", "storage of the network"):
        assert words in called.out
    assert set(digits.parent.rglob("*")) == before


def test_dry_run_of_more_processes_than_fit_here_tries_one_share_alone(bidm, digits):
    called = bidm(*arguments(digits, "--dry-run", "--steps", 7, "--processes", 512, "--batch-size", 512))
    assert called.code == 0, called.err
    assert "512 processes of 1 rows" in called.out and "in each process" in called.out
    assert "from steps of 1 rows that were tried)" in called.out


def test_without_a_trajectory_error_the_report_has_none(bidm, digits):
    called = bidm(*arguments(digits, "--steps", 1, "--no-trajectory"))
    assert called.code == 0, called.err
    assert "trajectory error" not in called.out
    assert bidm("report", "digits.bidm").code == 0


def test_no_such_device_is_one_line(bidm, digits):
    called = bidm(*arguments(digits, "--device", "cuda:9"))
    assert called.code == 1 and len(called.err.strip().splitlines()) == 1 and "--device cuda:9" in called.err


def test_no_training_at_all_still_packs_and_a_negative_seed_is_a_usage_error(bidm, digits):
    called = bidm(*arguments(digits, "--steps", 0, "-o", "untrained.bidm"))
    assert called.code == 0, called.err
    assert (digits.parent / "untrained.bidm").is_file()
    called = bidm(*arguments(digits, "--seed", -1))
    assert called.code == 2 and "--seed" in called.err


def test_default_output_is_named_after_the_checkpoint(bidm, digits):
    assert bidm(*arguments(digits, "--steps", 1)).code == 0
    assert (digits.parent / "digits.bidm").is_file()
    assert (digits.parent / "runs" / "digits-w1a1-1" / "result.json").is_file()


@pytest.mark.slow
def test_killed_by_the_system_it_resumes_to_the_same_bytes(bidm, digits):
    """SIGKILL in the middle of training; the file must be the one an uninterrupted run writes."""
    words = [str(a) for a in arguments(digits, "--steps", 60, "--run-dir", "run", "-o", "killed.bidm")]
    patch = "import bidm_cli.distill.trainer as t; t.CHECKPOINT_EVERY_SECONDS = 0.0;"
    code = f"{patch} from bidm_cli.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    log = digits.parent / "run" / "log.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 6):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (digits.parent / "killed.bidm").exists()
    done = subprocess.run(
        [sys.executable, "-c", "from bidm_cli.cli.main import main; main()", *words, "--resume"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    called = bidm(*arguments(digits, "--steps", 60, "--run-dir", "whole", "-o", "whole.bidm"))
    assert called.code == 0, called.err
    whole, resumed = ((digits.parent / f"{name}.bidm").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed
