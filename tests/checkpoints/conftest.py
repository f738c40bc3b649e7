"""Small checkpoints in the families' own layouts, and the originals of ../shared/checkpoints."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.registry import build

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"

LDM_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_head_channels": 32,
}
KL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_levels": [],
    "z_channels": 4,
    "embed_dim": 4,
}
DDPM_UNET: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
}


@pytest.fixture
def original() -> Callable[[str], Path]:
    """The folder of an original checkpoint; skips the test where it is not at hand."""

    def folder(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"needs {SHARED / name}")
        return SHARED / name

    return folder


def weights(kind: str, arguments: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A seeded network's state dict."""
    torch.manual_seed(seed)
    return build({"kind": kind, "args": arguments}).state_dict()


def ldm_state(
    *, ema: bool = False, unet: dict[str, Any] | None = None, first_stage: str | None = "kl_first_stage"
) -> dict[str, Tensor]:
    """``state_dict`` of an LDM Lightning file: U-Net, optional EMA and first stage, schedule buffers."""
    raw = weights("ldm_unet", unet or LDM_UNET)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in raw.items()}
    if ema:
        averaged = weights("ldm_unet", unet or LDM_UNET, seed=1)
        state |= {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in averaged.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    if first_stage:
        more = {"n_embed": 16} if first_stage == "vq_first_stage" else {}
        decoder = weights(first_stage, {**KL, **more})
        state |= {f"first_stage_model.{name}": tensor for name, tensor in decoder.items()}
        state["first_stage_model.loss.logvar"] = torch.zeros(())
    schedule = NoiseSchedule.scaled_linear(1000, 0.0015, 0.0155)
    return state | {"alphas_cumprod": schedule.alphas_cumprod.float(), "betas": schedule.betas.float()}


LDM_CONFIG: dict[str, Any] = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0155,
            "timesteps": 1000,
            "image_size": 8,
            "channels": 4,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": LDM_UNET,
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 16,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 32,
                        "ch_mult": [1, 1],
                        "num_res_blocks": 1,
                        "attn_resolutions": [],
                    },
                },
            },
            "cond_stage_config": "__is_unconditional__",
        },
    }
}
DDIM_CONFIG: dict[str, Any] = {
    "data": {"image_size": 16, "channels": 3},
    "model": {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "dropout": 0.1,
        "var_type": "fixedsmall",
        "in_channels": 3,
        "resamp_with_conv": True,
    },
    "diffusion": {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_diffusion_timesteps": 1000,
    },
}


def ldm_config(tmp_path: Path, change: Callable[[dict[str, Any]], None] = lambda params: None) -> Path:
    """:data:`LDM_CONFIG` with its ``params`` changed, as a file."""
    values = copy.deepcopy(LDM_CONFIG)
    change(values["model"]["params"])
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def evaluate(checkpoint: Checkpoint, ref: dict[str, np.ndarray]) -> Tensor:
    """The network on a ref.npz's inputs."""
    context = torch.from_numpy(ref["cond"]) if "cond" in ref else None
    with torch.no_grad():
        return checkpoint.denoise(torch.from_numpy(ref["x"]), torch.from_numpy(ref["t"]), context)


def assert_close(found: Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal to ``tolerance`` relative to the largest value."""
    wanted = torch.from_numpy(expected)
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.fixture
def foreign_class() -> Iterator[Callable[[str], type]]:
    """Makes a class of a package that is not installed, so that it can be pickled; gone after the test."""
    added: list[str] = []

    def make(dotted: str, base: type = object) -> type:
        module, _, name = dotted.rpartition(".")
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                added.append(path)
        cls = type(name, (base,), {"__module__": module})
        setattr(sys.modules[module], name, cls)
        return cls

    yield make
    for path in added:
        del sys.modules[path]
