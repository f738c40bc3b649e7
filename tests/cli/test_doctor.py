from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bidm_cli.cli.doctor import command
from bidm_cli.packed.machine import INCEPTION


def test_doctor_names_devices_kernels_and_versions() -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0, result.output
    for word in ("cpu:", "auto on cpu: numba", "instruction set:", "3x3 convolution", "torch 2", "cupy:"):
        assert word in result.output


def test_doctor_finds_cached_fid_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "not cached" in CliRunner().invoke(command, []).output
    target = tmp_path / "hub" / "checkpoints" / INCEPTION
    target.parent.mkdir(parents=True)
    target.write_bytes(b"123")
    assert f"{target} (3 bytes)" in CliRunner().invoke(command, []).output
