"""benchmarks/gpu_*.py from first line to last, at toy sizes and with made-up times: for the first GPU."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bidm_cli.packed.backends.cupy import CupyBackend
from tests.kernels.host_launcher import HostLauncher, available

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    timesteps: 1000
    image_size: 8
    channels: 3
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 8
        in_channels: 3
        out_channels: 3
        model_channels: 32
        attention_resolutions: [2]
        num_res_blocks: 1
        channel_mult: [1, 2]
        num_head_channels: 32
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """One of the scripts as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str, *arguments: object) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    return load


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Lets a script run without a GPU: every side once, timed as 2 and 1 microseconds."""
    if not available():
        pytest.skip("no g++ here")

    def graphed(run: Callable[[], object]) -> Callable[[], object]:
        run()
        return run

    def pretend(module: ModuleType) -> None:
        fakes: dict[str, Any] = {
            "require_gpu": lambda: None,
            "describe_gpu": lambda: "no GPU",
            "graphed": graphed,
            "microseconds": lambda sides, rounds, calls=1: [2.0, 1.0],
            "copies_beyond_cache": lambda x: [x, x.clone()],
        }
        for where in (module, importlib.import_module("gpu_timing")):
            for name, value in fakes.items():
                if hasattr(where, name):
                    monkeypatch.setattr(where, name, value)

    return pretend


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["gpu_layers", "gpu_unet"])
def test_without_a_gpu_one_line_says_so(name: str, script: Callable[..., ModuleType]) -> None:
    with pytest.raises(SystemExit, match=r"^This needs an NVIDIA GPU with cupy: .*\.$") as caught:
        script(name).main()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "planes"), [("float16", 1), ("float32", 1), ("float16", 2)])
def test_layers(
    dtype: str,
    planes: int,
    script: Callable[..., ModuleType],
    pretended: Callable[[ModuleType], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "layers.json"
    rows = tmp_path / "rows.jsonl"
    options = ("--type", dtype, "--planes", planes, "--check", "--json", path, "--record", rows)
    layers = script("gpu_layers", "--batches", 1, 2, *options)
    pretended(layers)
    shapes = [layers.Shape(4, 64, 32), layers.Shape(4, 32, 32, stride=2), layers.Shape(4, 64, 96, kernel=1)]
    monkeypatch.setattr(layers, "LDM4", shapes)
    monkeypatch.setattr(layers, "CupyBackend", lambda: CupyBackend(HostLauncher()))
    monkeypatch.setattr(layers, "measure", functools.partial(layers.measure, device="cpu"))
    layers.main()
    found = json.loads(path.read_text())["layers"]
    assert len(found) == 6 and all(row["ratio"] == 2.0 for row in found)
    recorded = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["numbers"] for row in recorded] == found and recorded[0]["machine"]["gpu"] == "no GPU"
    with_planes = "" if planes == 1 else ", 2 planes"
    assert recorded[1]["measurement"] == f"3x3 64->32 @4{with_planes}, batch 2, {dtype}"
    assert len(capsys.readouterr().out.splitlines()) == 3 + 6


def test_wrong_results_end_the_benchmark(
    script: Callable[..., ModuleType], pretended: Callable[[ModuleType], None]
) -> None:
    layers = script("gpu_layers")
    pretended(layers)

    class Wrong(CupyBackend):
        def run(self, *arguments: Any, **named: Any) -> Tensor:
            return super().run(*arguments, **named) * 1.1

    shape = layers.Shape(4, 32, 32)
    layer = layers.packed_from(torch.nn.Conv2d(32, 32, 3, padding=1), layers.BinarySpec()).requires_grad_(
        False
    )
    prologue = layers.Prologue(torch.nn.GroupNorm(32, 32).requires_grad_(False), silu=True)
    x = torch.randn(1, shape.channels, 4, 4)
    layers.assert_agrees(CupyBackend(HostLauncher()), layer, x, prologue)
    with pytest.raises(SystemExit, match="wrong results"):
        layers.assert_agrees(Wrong(HostLauncher()), layer, x, prologue)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unet(
    dtype: str,
    script: Callable[..., ModuleType],
    pretended: Callable[[ModuleType], None],
    cupy_on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    path = tmp_path / "steps.json"
    options = ("--batches", 1, 2, "--type", dtype, "--no-compile", "--json", path)
    unet = script("gpu_unet", "--config", tmp_path / "tiny.yaml", *options)
    pretended(unet)
    for name in ("paired", "float_step", "packed_step"):
        real = getattr(unet, name)
        monkeypatch.setattr(
            unet, name, lambda *given, real=real, **named: real(*given, **{**named, "device": "cpu"})
        )
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**30)
    unet.main()
    found = json.loads(path.read_text())["steps"]
    assert [row["batch"] for row in found] == [1, 2] and found[0]["ratio"] == 2.0
    assert len(capsys.readouterr().out.splitlines()) == 3 + 2


def test_the_network_of_the_benchmark_is_the_published_one(
    script: Callable[..., ModuleType], tmp_path: Path
) -> None:
    """On the meta device: 274 million parameters, 64x64 latents."""
    from bidm_cli.checkpoints.open import load_architecture

    (tmp_path / "ldm4.yaml").write_text(script("gpu_unet").LDM4)
    model = load_architecture(tmp_path / "ldm4.yaml")
    assert model.sample_shape == (3, 64, 64)
    assert sum(p.numel() for p in model.unet.parameters()) == 274_056_163
