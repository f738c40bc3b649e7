"""Peak memory of loading: below 1.3 times the file, every weight read, whatever the container."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints.conftest import weights
from tests.checkpoints.test_diffusers import _shards, _unet_state

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
MEASURE = """
import resource, sys
import bidm_cli.checkpoints.diffusers, bidm_cli.checkpoints.ldm
import bidm_cli.networks.diffusers_unet, bidm_cli.networks.ldm_unet
from bidm_cli.checkpoints.load import load_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
checkpoint = load_checkpoint(sys.argv[1])
total = sum(float(tensor.sum()) for tensor in checkpoint.unet.parameters())
print(peak() - before)
"""


def _ldm() -> dict[str, Tensor]:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in weights("ldm_unet", LARGE).items()}


def _zip(folder: Path) -> Path:
    torch.save({"state_dict": _ldm(), "callbacks": {}}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _plain(folder: Path) -> Path:
    torch.save({"state_dict": _ldm()}, folder / "x.ckpt", _use_new_zipfile_serialization=False)
    return folder / "x.ckpt"


def _with_optimizer(folder: Path) -> Path:
    state = _ldm()
    moments = [{name: torch.zeros_like(tensor) for name, tensor in state.items()}]
    torch.save({"state_dict": state, "optimizer_states": moments}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _flat(folder: Path) -> Path:
    save_file(_ldm(), str(folder / "x.safetensors"))
    return folder / "x.safetensors"


def _sharded(folder: Path) -> Path:
    from tests.checkpoints.test_diffusers import UNET

    (folder / "config.json").write_text(json.dumps({**UNET, **WIDE}))
    _shards(folder, _unet_state(**WIDE))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("container", [_zip, _plain, _with_optimizer, _flat, _sharded])
def test_peak_memory(container: Callable[[Path], Path], tmp_path: Path) -> None:
    path = container(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 100e6
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 1.3 * size
