"""Fixtures for all tests: the shared checkpoints, and the command line called in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Tests neither time kernels nor write to the user's cache.
os.environ.setdefault("BIDM_TUNE", "0")
os.environ.setdefault("BIDM_LATENTS_GIB", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: two OpenMP teams of all cores would wait for each other. Tests of threads set
    # their own number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = (
    "kernels", "end_to_end", "fuzz", "fake_cuda", "faults", "packed/recording", "checkpoints/test_memory.py",
    "checkpoints/test_export_families.py", "checkpoints/test_export_diffusers.py",
    "checkpoints/test_infer_unet.py", "checkpoints/test_ldm.py", "packed/cpu/test_kernels.py",
    "packed/test_written_by_0_1_0.py", "packed/test_fused_families.py", "report/test_metrics.py",
    "report/test_sign_flips.py", "distill/test_trainer.py", "networks/test_published.py",
)  # fmt: skip
"""Folders and files of tests that take most of the suite's time; ``make fast`` leaves them out."""

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in :data:`LONG` as long."""
    here = Path(__file__).resolve().parent
    for item in items:
        path = item.path.relative_to(here).as_posix()
        if any(path == place or path.startswith(f"{place}/") for place in LONG):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real-format checkpoints, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: the real-format checkpoints are not here")
    return SHARED


@dataclass
class Called:
    """What one ``bidm`` call did."""

    code: int
    out: str
    err: str


@pytest.fixture
def bidm(monkeypatch, capfd) -> Callable[..., Called]:
    """``bidm("sample", "x.bidm", "-n", 4)`` through the console script's own entry point."""
    from bidm_cli.cli.main import main

    def call(*arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["bidm", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else (1 if stop.code else 0)
        out, err = capfd.readouterr()
        return Called(code, out, err)

    return call
