from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bidm_cli.checkpoints.families.diffusers.config import condition_unet_from_config
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.networks.spatial_transformer import SpatialTransformer

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def _state(**more: Any) -> dict[str, Tensor]:
    """A state dict under diffusers' names: a UNet2DModel's, with transformers where it has attention."""
    linear, in_channels = more.get("use_linear_projection", False), more.get("in_channels", 4)
    plain = build(
        {
            "kind": "diffusers_unet",
            "args": {
                "in_channels": in_channels,
                "out_channels": 4,
                "block_out_channels": [32, 64],
                "layers_per_block": 1,
                "attention_levels": [0],
            },
        }
    )
    state = {}
    for name, module in plain.named_modules():
        if name.rpartition(".")[0].endswith("attentions"):
            width = module.group_norm.num_channels  # type: ignore[union-attr]
            transformer = SpatialTransformer(width, 4, width // 4, [24], linear)  # type: ignore[operator, arg-type]
            state |= {f"{name}.{key}": value for key, value in transformer.state_dict().items()}
    return state | {name: t for name, t in plain.state_dict().items() if ".attentions." not in name}


def _folder(tmp_path: Path, **more: Any) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**UNET, **more}))
    save_file(_state(**more), str(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"))
    return tmp_path


@pytest.mark.parametrize(
    "more", [{}, {"use_linear_projection": True, "attention_head_dim": [2, 4]}, {"in_channels": 9}]
)
def test_loads_under_its_own_names(tmp_path: Path, more: dict[str, Any]) -> None:
    checkpoint = load_checkpoint(_folder(tmp_path, **more))
    assert checkpoint.architecture["unet"]["kind"] == "diffusers_condition_unet"
    assert checkpoint.context_width == 24
    with torch.no_grad():
        x = torch.randn(1, more.get("in_channels", 4), 8, 8)
        assert checkpoint.denoise(x, torch.tensor([3]), torch.randn(1, 2, 24)).shape == (1, 4, 8, 8)
    with pytest.raises(BidmError, match="attends to a context"):
        checkpoint.denoise(x, torch.tensor([3]))


def test_stable_diffusion_1_and_2(tmp_path: Path) -> None:
    values = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
    (tmp_path / "config.json").write_text(json.dumps(values))
    checkpoint = load_architecture(tmp_path / "config.json")
    assert sum(p.numel() for p in checkpoint.unet.parameters()) == 859_520_964
    assert checkpoint.architecture["unet"]["args"]["num_heads"] == [8, 8, 8, 8]
    values |= {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    arguments = condition_unet_from_config(Section(values, "test"))["args"]
    assert arguments["num_heads"] == [5, 10, 20, 20]


@pytest.mark.parametrize(
    "change",
    [
        {"addition_embed_type": "text_time"},
        {"transformer_layers_per_block": [1, 2, 3]},
        {"transformer_layers_per_block": [[1], [1]]},
        {"transformer_layers_per_block": 0},
        {"only_cross_attention": [True]},
        {"only_cross_attention": 3},
        {
            "cross_attention_dim": [24, 16],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        },
        {"dual_cross_attention": True},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"class_embed_type": "projection"},
        {"time_cond_proj_dim": 256},
        {"conv_in_kernel": 2},
        {"down_block_types": ["KDownBlock2D", "DownBlock2D"]},
        {"attention_head_dim": [33, 7]},
        {"attention_head_dim": 0},
        {"act_fn": "gelu"},
        {"block_out_channels": [0, 64]},
        {"block_out_channels": []},
        {"layers_per_block": -1},
        {"cross_attention_dim": None, "encoder_hid_dim": 3},
        {"up_block_types": 3},
    ],
)
def test_other_networks_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**UNET, **change}))
    with pytest.raises(BidmError) as caught:
        load_architecture(tmp_path / "config.json")
    assert "\n" not in str(caught.value)
