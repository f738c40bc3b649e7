"""The line about compiling kernels: there with a cold cache, not with a warm one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bidm_cli.packed.cpu.codegen.isa import TILES, instruction_set
from bidm_cli.packed.cpu.ops import warm_up
from bidm_cli.packed.cpu.runtime import kernel_cache
from bidm_cli.packed.uses import Use
from tests.report.models import packed_of, tiny

ROOT = Path(__file__).resolve().parents[2]


def test_told_of_what_is_missing_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    uses = [Use("blend")]
    warm_up.prepare(uses)
    warm_up.prepare(uses, said.append)
    assert said == []
    monkeypatch.setenv("BIDM_KERNEL_CACHE", str(tmp_path))
    warm_up.prepare(uses, said.append)
    assert said[:3] == ["compiling 2 kernels for this machine, once:", " 1", " 2"] and len(said) == 4
    assert said[3].endswith(" s\n") and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(kernel_cache, "is_writable", lambda: False)
    monkeypatch.setattr(kernel_cache, "read", lambda name: None)
    warm_up.prepare(uses, said.append)
    assert said[4] == "compiling 2 kernels for this machine, as its cache cannot be written to:"


@pytest.mark.parametrize("planes", [1, 2])
def test_a_model_names_all_kernels_that_its_pictures_need_and_no_others(planes: int, tmp_path: Path) -> None:
    """But for a norm's second form, and tiles that were not faster."""
    packed_of(tiny(), tmp_path / "m.bidm", f"w1a{planes}")
    program = (
        "import sys, bidm_cli; from bidm_cli.packed.cpu.runtime import kernels\n"
        f"model = bidm_cli.load_packed({str(tmp_path / 'm.bidm')!r}); model.warm_up()\n"
        "before = {name for name, _ in kernels.LOADED.values()}\n"
        "bidm_cli.sample(model, n=1, steps=3)\n"
        "assert {name for name, _ in kernels.LOADED.values()} == before, 'a kernel was not foreseen'\n"
        "assert 'numba' not in sys.modules, 'numba was imported with a warm cache'\n"
        "print(*sorted(before))"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert {"sequence", "norm", "pack_plain", "pack_normed_silu"} <= set(found)
    assert not any("rms" in name or "binary" in name or "winograd" in name for name in found)
    assert any("pairs" in name for name in found) == TILES[instruction_set()][0].pairs


@pytest.mark.slow
def test_a_cold_cache_is_told_once(tmp_path: Path) -> None:
    packed_of(tiny(), tmp_path / "m.bidm")
    program = "from bidm_cli.cli.main import main; main()"
    command = [sys.executable, "-c", program, "sample", str(tmp_path / "m.bidm"), "-n", "1", "--steps", "1"]
    environment = {**os.environ, "BIDM_KERNEL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for expected in (1, 0):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / f"out{expected}")],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.count(" kernels for this machine, once: 1 2 ") == expected, done.stderr
