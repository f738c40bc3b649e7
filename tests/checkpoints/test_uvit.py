from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bidm_cli
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import weights

ARGUMENTS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 3,
    "embed_dim": 64,
    "half_depth": 1,
    "num_heads": 1,
}


def _state(**change: Any) -> dict[str, Tensor]:
    return weights("uvit", {**ARGUMENTS, **change})


def _save(tmp_path: Path, state: Any, name: str = "nnet.pth") -> Path:
    torch.save(state, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"label_rows": 11, "mlp_time_embed": True},
        {"conv": False, "skip": False, "qkv_bias": True, "mlp_width": 96},
        {"half_depth": 3, "patch_size": 4},
        {"in_chans": 4, "time_scale": 1.0, "label_rows": 11},
        {"in_chans": 4, "time_scale": 1.0, "context_dim": 24, "context_tokens": 77},
    ],
)
def test_inferred_as_built(tmp_path: Path, change: dict[str, Any]) -> None:
    checkpoint = load_checkpoint(_save(tmp_path, _state(**change)))
    assert {**ARGUMENTS, **change}.items() <= checkpoint.architecture["unet"]["args"].items()
    latent = change.get("in_chans") == 4
    assert checkpoint.null_label == (10 if latent and "label_rows" in change else None)
    assert any("`raw`" in note for note in checkpoint.evidence) == latent
    assert checkpoint.schedule.description["kind"] == ("scaled_linear" if latent else "explicit")


def test_vp_sde_of_pixel_models(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(_save(tmp_path, _state()))
    betas = checkpoint.schedule.betas
    assert 1e-4 < betas[0] < 1.2e-4 and 0.0195 < betas[-1] < 0.02
    assert checkpoint.architecture["unet"]["args"]["time_scale"] == 0.999
    assert bidm_cli.sample(checkpoint, n=1, steps=3).isfinite().all()


def test_averages_by_the_files_name(tmp_path: Path) -> None:
    assert load_checkpoint(_save(tmp_path, _state(), "nnet_ema.pth")).ema
    assert not load_checkpoint(_save(tmp_path, _state())).ema


def test_heads(tmp_path: Path) -> None:
    assert (
        load_checkpoint(_save(tmp_path, _state(embed_dim=512))).architecture["unet"]["args"]["num_heads"] == 8
    )
    path = _save(tmp_path, _state(embed_dim=48))
    with pytest.raises(BidmError, match="num_heads"):
        load_checkpoint(path)
    (tmp_path / "given.json").write_text(json.dumps({"img_size": 8, "embed_dim": 48, "num_heads": 6}))
    checkpoint = load_checkpoint(path, config=tmp_path / "given.json")
    assert checkpoint.architecture["unet"]["args"]["num_heads"] == 6
    (tmp_path / "given.json").write_text(json.dumps({"img_size": 16, "num_heads": 6}))
    with pytest.raises(BidmError, match="img_size is 16, but the weights have 8"):
        load_checkpoint(path, config=tmp_path / "given.json")


def test_bare_configuration(tmp_path: Path) -> None:
    values = {"img_size": 32, "patch_size": 2, "embed_dim": 512, "depth": 12, "num_heads": 8}
    (tmp_path / "cifar.json").write_text(json.dumps(values))
    bare = load_architecture(tmp_path / "cifar.json")
    assert sum(parameter.numel() for parameter in bare.unet.parameters()) == 44_255_328
    assert bare.sample_shape == (3, 32, 32) and not bare.has_weights


@pytest.mark.parametrize(
    "break_it",
    [
        lambda state: state.pop("pos_embed"),
        lambda state: state.update(pos_embed=torch.zeros(1, 1, 64)),
        lambda state: state.update(pos_embed=torch.zeros(1, 0, 64)),
        lambda state: state.update({"context_embed.weight": torch.zeros(64, 768)}),
        lambda state: state.update({"context_embed.weight": torch.zeros(64)}),
        lambda state: state.update({"patch_embed.proj.weight": torch.zeros(64)}),
        lambda state: state.pop("in_blocks.0.attn.proj.bias"),
        lambda state: state.pop("mid_block.mlp.fc1.weight"),
    ],
)
def test_damaged_files(tmp_path: Path, break_it: Any) -> None:
    state = _state()
    break_it(state)
    with pytest.raises(BidmError) as caught:
        load_checkpoint(_save(tmp_path, state))
    assert "nnet.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_text_conditional(tmp_path: Path) -> None:
    path = _save(tmp_path, _state(in_chans=4, context_dim=24, context_tokens=5))
    with pytest.raises(BidmError, match="context_tokens=N"):
        load_checkpoint(path)
    checkpoint = load_checkpoint(path, settings={"context_tokens": 5})
    assert (checkpoint.context_width, checkpoint.example(2).context.shape) == (24, (2, 5, 24))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0, 500])
    with pytest.raises(BidmError, match="contexts of 5 tokens"):
        checkpoint.denoise(x, t, torch.randn(2, 6, 24))
    nnet = {
        "name": "uvit_t2i",
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 4,
        "embed_dim": 64,
        "num_heads": 1,
    }
    config = tmp_path / "t2i.json"
    config.write_text(json.dumps({"nnet": {**nnet, "depth": 3, "clip_dim": 24, "num_clip_token": 5}}))
    assert load_checkpoint(path, config=config).architecture == checkpoint.architecture
    assert load_architecture(config).context_width == 24
    assert bidm_cli.cost(checkpoint).macs > 0


def test_configuration_as_the_project_nests_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"nnet": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "num_heads": 4}}))
    checkpoint = load_architecture(path)
    assert (checkpoint.family, checkpoint.architecture["unet"]["args"]["num_heads"]) == ("uvit", 4)
