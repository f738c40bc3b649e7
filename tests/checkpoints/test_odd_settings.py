"""Any setting of a configuration replaced by something odd: opened, or one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bidm_cli.checkpoints.open import load_architecture
from bidm_cli.errors import BidmError

ODD: list[Any] = [None, -1, 10**30, float("nan"), "x", [], [None], {"a": 1}, [10**9] * 2]
OPENAI_UNET = {"in_channels": 3, "out_channels": 6, "model_channels": 32, "num_res_blocks": 1, "num_heads": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "freq_shift": 0,
        "num_class_embeds": 3,
    },
    "UNet2DConditionModel": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "OpenAI's flags": {
        "image_size": 32,
        "num_channels": 32,
        "num_res_blocks": 1,
        "num_heads": 2,
        "attention_resolutions": "16,8",
        "channel_mult": "1,2",
        "diffusion_steps": 4000,
        "noise_schedule": "linear",
    },
    "OpenAI's arguments": {
        "library": "guided",
        "image_size": 16,
        "diffusion": {"steps": 100, "learn_sigma": True},
        "unet": {**OPENAI_UNET, "channel_mult": [1, 2], "attention_resolutions": [2]},
    },
    "w86763777": {
        "T": 20,
        "ch": 32,
        "ch_mult": [1, 2],
        "attn": [1],
        "num_res_blocks": 1,
        "beta_1": 1e-4,
        "beta_T": 0.01,
        "img_size": 16,
        "var_type": "fixedsmall",
    },
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "prediction_type": "epsilon",
}


def _refusals(values: dict[str, Any], path: Path, opened: Path) -> int:
    """How many of the replacements are refused; each in one line."""
    refused = 0
    for name in values:
        for odd in ODD:
            path.write_text(json.dumps({**values, name: odd}))
            try:
                load_architecture(opened)
            except BidmError as error:
                refused += 1
                assert "\n" not in str(error)
                assert len(str(error)) < 1500
    return refused


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_odd_networks(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    values = CONFIGURATIONS[name]
    assert _refusals(values, path, path) > len(values)
    path.write_text(json.dumps(values))
    load_architecture(path)


def test_odd_schedulers(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGURATIONS["UNet2DModel"]))
    assert _refusals(SCHEDULER, tmp_path / "scheduler_config.json", config) > len(SCHEDULER)
