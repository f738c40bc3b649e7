from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bidm_cli.checkpoints.families.w86 import infer_w86_unet
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.state import on_meta, shapes_of
from bidm_cli.errors import BidmError
from bidm_cli.sampling.sample import sample
from tests.checkpoints.conftest import assert_close, weights
from tests.networks.published import W86_UNETS

UNET: dict[str, Any] = {
    "timesteps": 20,
    "in_channels": 3,
    "out_channels": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
}


def _state(seed: int = 0, **more: Any) -> dict[str, torch.Tensor]:
    return weights("w86_unet", {**UNET, **more}, seed)


def _save(tmp_path: Path, **contents: Any) -> Path:
    torch.save({"net_model": _state(0), "ema_model": _state(1), "step": 3} | contents, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_both_sets_of_weights_and_the_size(tmp_path: Path) -> None:
    path = _save(tmp_path, x_T=torch.zeros(4, 3, 16, 24))
    averaged, trained = load_checkpoint(path), load_checkpoint(path, ema=False)
    assert (averaged.family, averaged.ema, trained.ema) == ("w86763777", True, False)
    assert averaged.sample_shape == (3, 16, 24)
    for checkpoint, seed in ((averaged, 1), (trained, 0)):
        for name, value in _state(seed).items():
            assert torch.equal(checkpoint.unet.get_parameter(name), value)
    assert averaged.schedule.timesteps == 20
    assert averaged.convention.variance == "large"
    assert load_checkpoint(_save(tmp_path)).sample_shape == (3, 32, 32)


@pytest.mark.parametrize(
    "option",
    [
        {"attention_levels": []},
        {"attention_levels": [0, 1]},
        {"num_res_blocks": 3},
        {"ch_mult": [2], "attention_levels": [0]},
        {"ch_mult": [1, 1, 2], "in_channels": 1, "out_channels": 1},
    ],
)
def test_inferred_as_built(option: dict[str, Any]) -> None:
    arguments = {**UNET, **option}
    found = infer_w86_unet(shapes_of(on_meta({"kind": "w86_unet", "args": arguments}).state_dict()))
    assert arguments == found


def test_the_published_network_is_recognised() -> None:
    architecture, _ = W86_UNETS["w86763777 CIFAR-10"]
    found = infer_w86_unet(shapes_of(on_meta(architecture).state_dict()))
    assert architecture["args"].items() <= found.items()


def test_ancestral_sampling_clips_nothing_on_the_way(tmp_path: Path) -> None:
    """The original's loop: mean from the unclipped x0, variance beta, no noise at t = 0."""
    checkpoint = load_checkpoint(_save(tmp_path, x_T=torch.zeros(1, 3, 16, 16)))
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    noises = [torch.randn_like(x) for _ in range(20)]
    drawn = sample(checkpoint, steps=20, sampler="ddpm", x_t=x, noises=noises)
    betas = torch.linspace(1e-4, 0.02, 20).double()
    bar = (1 - betas).cumprod(0).tolist()
    for i, t in enumerate(reversed(range(20))):
        with torch.no_grad():
            eps = checkpoint.unet(x, torch.full((2,), t))
        beta, before = float(betas[t]), bar[t - 1] if t else 1.0
        x0 = math.sqrt(1 / bar[t]) * x - math.sqrt(1 / bar[t] - 1) * eps
        mean = math.sqrt(before) * beta / (1 - bar[t]) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - before) / (1 - bar[t]) * x
        x = mean + math.sqrt(beta) * noises[i] * (t > 0)
    assert_close(drawn, x.numpy())


def test_settings_as_json(tmp_path: Path) -> None:
    values = {"T": 20, "ch": 32, "ch_mult": [1, 2], "attn": [1], "num_res_blocks": 1, "beta_T": 0.01}
    values |= {"img_size": 16, "var_type": "fixedsmall", "mean_type": "xstart"}
    (tmp_path / "c.json").write_text(json.dumps(values))
    for checkpoint in (
        load_architecture(tmp_path / "c.json"),
        load_checkpoint(_save(tmp_path), config=tmp_path / "c.json"),
    ):
        assert checkpoint.sample_shape == (3, 16, 16)
        assert checkpoint.schedule.description["end"] == 0.01
        assert (checkpoint.convention.variance, checkpoint.prediction) == ("small", "x0")
    (tmp_path / "c.json").write_text(json.dumps(values | {"mean_type": "xprev"}))
    with pytest.raises(BidmError, match="mean_type"):
        load_architecture(tmp_path / "c.json")


@pytest.mark.parametrize("missing", ["downblocks.0.block1.2.weight", "tail.2.bias", "head.weight"])
def test_incomplete_files(tmp_path: Path, missing: str) -> None:
    state = _state()
    del state[missing]
    with pytest.raises(BidmError, match="ckpt") as caught:
        load_checkpoint(_save(tmp_path, net_model=state, ema_model=state))
    assert "\n" not in str(caught.value)
