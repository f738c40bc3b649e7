"""Peak memory of loading: below 1.3 times the file, every weight read, whatever its container and type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints.conftest import weights
from tests.checkpoints.test_diffusers import _shards, _unet_state

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
LARGE = {
    "in_channels": 4, "out_channels": 4, "model_channels": 128, "num_res_blocks": 1,
    "channel_mult": [1, 2, 4], "attention_resolutions": [4], "num_head_channels": 32,
}  # fmt: skip
WIDE = {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}
# The networks' modules first: what is measured is the weights.
# Not ru_maxrss: a new process inherits that from the one that started it.
PEAK = """
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
"""
MEASURE = f"""
import sys
import bidm_cli.checkpoints.families.diffusers.load, bidm_cli.checkpoints.families.ldm.load
import bidm_cli.networks.diffusers.unet, bidm_cli.networks.ldm_unet
from bidm_cli.checkpoints.open import load_checkpoint
{PEAK}
before = peak()
checkpoint = load_checkpoint(sys.argv[1])
total = sum(float(tensor.sum()) for tensor in checkpoint.unet.parameters())
print(peak() - before)
"""


INSPECT = f"""
import sys
import bidm_cli.checkpoints.families.ldm.load, bidm_cli.networks.ldm_unet
import bidm_cli.report.inspection, torch.nn.functional
import bidm_cli.cli.models
from click.testing import CliRunner
from bidm_cli.cli.main import cli as main
{PEAK}
def inspect(path):
    done = CliRunner().invoke(main, ["inspect", path, "--set", "num_heads=8"])
    assert done.exit_code == 0, done.output
inspect(sys.argv[2])
before = peak()
inspect(sys.argv[1])
print(peak() - before)
"""
HALF, DOUBLE = torch.float16, torch.float64


def _ldm(dtype: torch.dtype, arguments: dict[str, Any] = LARGE) -> dict[str, Tensor]:
    made = weights("ldm_unet", arguments).items()
    return {f"model.diffusion_model.{name}": tensor.to(dtype) for name, tensor in made}


def _zip(folder: Path, dtype: torch.dtype) -> Path:
    torch.save({"state_dict": _ldm(dtype), "callbacks": {}}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _plain(folder: Path, dtype: torch.dtype) -> Path:
    torch.save({"state_dict": _ldm(dtype)}, folder / "x.ckpt", _use_new_zipfile_serialization=False)
    return folder / "x.ckpt"


def _with_optimizer(folder: Path, dtype: torch.dtype) -> Path:
    state = _ldm(dtype)
    moments = [{name: torch.zeros_like(tensor) for name, tensor in state.items()}]
    torch.save({"state_dict": state, "optimizer_states": moments}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _with_averages(folder: Path, dtype: torch.dtype) -> Path:
    state = _ldm(torch.float32)
    averages = {
        "model_ema.diffusion_model" + name.removeprefix("model.diffusion_model.").replace(".", ""): tensor
        for name, tensor in _ldm(dtype).items()
    }
    torch.save({"state_dict": state | averages}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _flat(folder: Path, dtype: torch.dtype) -> Path:
    save_file(_ldm(dtype), str(folder / "x.safetensors"))
    return folder / "x.safetensors"


def _sharded(folder: Path, dtype: torch.dtype) -> Path:
    from tests.checkpoints.test_diffusers import UNET

    (folder / "config.json").write_text(json.dumps({**UNET, **WIDE}))
    _shards(folder, {name: tensor.to(dtype) for name, tensor in _unet_state(**WIDE).items()})
    return folder


def _run(*arguments: str | Path) -> int:
    command = [sys.executable, "-c", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@linux
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16, DOUBLE], ids=str)
@pytest.mark.parametrize("container", [_zip, _plain, _with_optimizer, _with_averages, _flat, _sharded])
def test_peak_memory(
    container: Callable[[Path, torch.dtype], Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    if dtype in (torch.bfloat16, DOUBLE) and container not in (_zip, _flat):
        pytest.skip("once for each way to map a file is enough")
    path = container(tmp_path, dtype)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 50e6
    assert _run(MEASURE, path) < 1.3 * size


@linux
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_inspecting_takes_hardly_any_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    path, small = _zip(tmp_path, dtype), tmp_path / "small.ckpt"
    torch.save({"state_dict": _ldm(dtype, {**LARGE, "model_channels": 32})}, small)
    assert _run(INSPECT, path, small) < 0.2 * path.stat().st_size
