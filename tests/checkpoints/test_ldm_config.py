from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.errors import BidmError
from bidm_cli.report.cost.cost import cost
from bidm_cli.sampling.sample import sample
from tests.checkpoints.conftest import LDM_UNET, ldm_config, ldm_state


def _save(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ({"parameterization": "x0"}, "prediction", "x0"),
        ({"parameterization": "v"}, "prediction", "v"),
        ({"image_size": [8, 16]}, "sample_shape", (4, 8, 16)),
        ({"channels": 2}, "sample_shape", (2, 8, 8)),
        ({}, "prediction", "epsilon"),
    ],
)
def test_settings(tmp_path: Path, setting: dict[str, Any], field: str, value: Any) -> None:
    config = ldm_config(tmp_path, lambda params: params.update(setting))
    assert getattr(load_checkpoint(_save(tmp_path, ldm_state()), config=config), field) == value


@pytest.mark.parametrize("kind", ["linear", "sqrt_linear", "cosine", "sqrt"])
def test_schedules_of_a_configuration(tmp_path: Path, kind: str) -> None:
    config = ldm_config(tmp_path, lambda params: params.update(beta_schedule=kind, timesteps=50))
    schedule = load_architecture(config).schedule
    start, end, steps = 0.0015, 0.0155, 50
    betas = {
        "linear": torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2,
        "sqrt_linear": torch.linspace(start, end, steps, dtype=torch.float64),
        "sqrt": torch.linspace(start, end, steps, dtype=torch.float64) ** 0.5,
    }
    if kind in betas:
        torch.testing.assert_close(schedule.betas, betas[kind], rtol=1e-9, atol=1e-12)
    else:
        u = torch.arange(1, steps, dtype=torch.float64) / steps
        expected = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        torch.testing.assert_close(schedule.alphas_cumprod[:-1], expected)


@pytest.mark.parametrize("nested", [True, False])
def test_json_of_constructor_arguments(tmp_path: Path, nested: bool) -> None:
    diffusion = {"timesteps": 20, "linear_start": 0.001, "linear_end": 0.01, "image_size": 8}
    values = {"unet": LDM_UNET, "diffusion": diffusion} if nested else {**LDM_UNET, **diffusion}
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(values))
    state = {k: v for k, v in ldm_state().items() if k.startswith(("model.", "first_stage"))}
    checkpoint = load_checkpoint(_save(tmp_path, state), config=path)
    assert checkpoint.first_stage is not None
    bare = load_architecture(path)
    assert not bare.has_weights
    assert checkpoint.schedule.timesteps == bare.schedule.timesteps == 20
    assert checkpoint.sample_shape == bare.sample_shape == (4, 8, 8)
    path.write_text(json.dumps({**values, "magic": 3} if not nested else {"unet": {**LDM_UNET, "magic": 3}}))
    with pytest.raises(BidmError, match="magic"):
        load_architecture(path)


def test_bare_configuration(original: Callable[[str], Path]) -> None:
    bare = load_architecture(original("ldm_class_conditional") / "config.yaml")
    full = load_checkpoint(original("ldm_class_conditional") / "model.ckpt")
    assert not bare.has_weights
    assert bare.metadata() == full.metadata()
    for part in ("unet", "first_stage", "conditioner"):
        network, twin = getattr(bare, part), getattr(full, part)
        assert all(parameter.is_meta for parameter in network.parameters())
        assert {k: v.shape for k, v in network.state_dict().items()} == {
            k: v.shape for k, v in twin.state_dict().items()
        }
    assert bare.to("cpu").device.type == "meta"


def test_unknown_settings_of_the_unet_are_refused(tmp_path: Path) -> None:
    def strange(params: dict[str, Any]) -> None:
        params["unet_config"]["params"]["disable_self_attentions"] = [True]

    with pytest.raises(BidmError, match="disable_self_attentions"):
        load_architecture(ldm_config(tmp_path, strange))

    def harmless(params: dict[str, Any]) -> None:
        params["unet_config"]["params"].update(use_checkpoint=True, legacy=False, something_off=False)

    load_architecture(ldm_config(tmp_path, harmless))


@pytest.mark.parametrize(("legacy", "heads"), [(True, 4), (False, -1)])
def test_heads_of_the_decoder_without_legacy(tmp_path: Path, legacy: bool, heads: int) -> None:
    """Without ``legacy`` the original takes every layer's heads from ``num_heads``."""

    def change(params: dict[str, Any]) -> None:
        unet = params["unet_config"]["params"]
        unet.pop("num_head_channels", None)
        unet |= {"num_heads": 2, "num_heads_upsample": 4, "legacy": legacy}

    arguments = load_architecture(ldm_config(tmp_path, change)).architecture["unet"]["args"]
    assert arguments["num_heads_upsample"] == heads


def test_attention_by_level(tmp_path: Path) -> None:
    settings = {"num_attention_blocks": [1, 0], "disable_self_attentions": [True, False]}

    def change(params: dict[str, Any]) -> None:
        params["unet_config"]["params"] |= {**settings, "num_res_blocks": 2, "channel_mult": [1, 2]}

    arguments = load_architecture(ldm_config(tmp_path, change)).architecture["unet"]["args"]
    assert settings.items() <= arguments.items()

    def wrong(params: dict[str, Any]) -> None:
        params["unet_config"]["params"]["disable_self_attentions"] = [1, 2]

    with pytest.raises(BidmError, match="a list of true and false"):
        load_architecture(ldm_config(tmp_path, wrong))


@pytest.mark.parametrize(
    ("settings", "width"),
    [({"num_classes": "sequential", "adm_in_channels": 6}, 6), ({"num_classes": "continuous"}, 1)],
)
def test_vectors_load_and_denoise_but_do_not_sample(
    tmp_path: Path, settings: dict[str, Any], width: int
) -> None:
    ours = {"adm_in_channels": width, "adm_layers": 2 if width > 1 else 1}
    path = _save(tmp_path, ldm_state(unet={**LDM_UNET, **ours}))
    config = ldm_config(tmp_path, lambda params: params["unet_config"]["params"].update(settings))
    for given in (config, None):
        checkpoint = load_checkpoint(path, config=given)
        assert (checkpoint.vector_width, checkpoint.num_classes) == (width, None)
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
        zero = checkpoint.denoise(x, t, y=torch.zeros(1, width))
        assert not torch.equal(checkpoint.denoise(x, t, y=torch.ones(1, width)), zero)
        assert cost(checkpoint).macs > 0
        with pytest.raises(BidmError, match="neither sample nor train"):
            sample(checkpoint, n=1, steps=2)
