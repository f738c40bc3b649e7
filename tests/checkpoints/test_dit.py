from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import bidm_cli
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.errors import BidmError
from bidm_cli.sampling.guidance import GuidedDenoiser
from tests.checkpoints.conftest import assert_close, weights

ARGUMENTS: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 1,
    "label_rows": 11,
}


def _save(tmp_path: Path, contents: Any, name: str = "model.pt") -> Path:
    torch.save(contents, tmp_path / name)
    return tmp_path / name


def _config(tmp_path: Path, values: dict[str, Any]) -> Path:
    (tmp_path / "given.json").write_text(json.dumps(values))
    return tmp_path / "given.json"


def _state(seed: int = 0, **change: Any) -> dict[str, Tensor]:
    return weights("dit", {**ARGUMENTS, **change}, seed)


@pytest.fixture
def reference(original: Callable[[str], Path]) -> dict[str, Tensor]:
    with np.load(original("dit") / "ref.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture
def checkpoint(original: Callable[[str], Path]) -> Any:
    return load_checkpoint(original("dit") / "DiT-tiny-plain.pt")


def test_original_network(checkpoint: Any, reference: dict[str, Tensor]) -> None:
    with torch.no_grad():
        found = checkpoint.denoise(reference["x"], reference["t"], y=reference["y"])
    assert_close(found, reference["out_ema"].numpy())
    assert (checkpoint.family, checkpoint.ema, checkpoint.sample_shape) == ("dit", True, (4, 8, 8))
    assert (checkpoint.null_label, checkpoint.num_classes) == (10, 11)
    assert checkpoint.convention.variance == "learned_range"
    assert any("sd-vae-ft" in note and "`raw`" in note for note in checkpoint.evidence)


def test_original_guidance(checkpoint: Any, reference: dict[str, Tensor]) -> None:
    for i in range(2):
        denoiser = GuidedDenoiser(
            checkpoint, checkpoint.make_condition(reference["y"][i : i + 1]), float(reference["cfg_scale"])
        )
        with torch.no_grad():
            found = denoiser(reference["x"][i : i + 1], int(reference["t"][i]))
        assert_close(found, reference["cfg_out"][i : i + 1].numpy())


@pytest.mark.parametrize(("guidance", "name"), [(1.0, "ddim5_out"), (4.0, "ddim5_cfg_out")])
def test_original_ddim(checkpoint: Any, reference: dict[str, Tensor], guidance: float, name: str) -> None:
    found = bidm_cli.sample(
        checkpoint, steps=5, x_t=reference["xT"], labels=reference["y"], guidance=guidance
    )
    assert_close(found, reference[name].numpy())


def test_without_its_configuration_the_heads_are_asked_for(
    original: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copy(original("dit") / "DiT-tiny-plain.pt", tmp_path))
    with pytest.raises(BidmError, match="num_heads") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    config = _config(tmp_path, {"hidden_size": 96, "num_heads": 6})
    assert load_checkpoint(path, config=config).architecture["unet"]["args"]["num_heads"] == 6


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (128, 2)])
def test_heads_are_assumed_aloud(tmp_path: Path, width: int, heads: int) -> None:
    checkpoint = load_checkpoint(_save(tmp_path, _state(hidden_size=width, num_heads=heads, depth=1)))
    assert checkpoint.architecture["unet"]["args"]["num_heads"] == heads
    assert any(f"heads: {heads}" in note and "`settings` num_heads" in note for note in checkpoint.evidence)


def test_training_file(tmp_path: Path) -> None:
    raw, averaged = _state(0, hidden_size=384), _state(1, hidden_size=384)
    args = argparse.Namespace(model="DiT-S/2", num_classes=10, image_size=64, vae="ema", lr=None)
    path = _save(
        tmp_path, {"model": raw, "ema": averaged, "opt": {"state": {}, "param_groups": []}, "args": args}
    )
    preferred, trained = load_checkpoint(path), load_checkpoint(path, ema=False)
    assert (preferred.ema, trained.ema) == (True, False)
    for checkpoint, state in ((preferred, averaged), (trained, raw)):
        assert all(torch.equal(value, state[name]) for name, value in checkpoint.unet.state_dict().items())
    assert any("6 (from the training options in the file)" in note for note in preferred.evidence)
    assert preferred.null_label == 10


def test_averages_alone(tmp_path: Path) -> None:
    path = _save(tmp_path, {"ema": _state()})
    assert load_checkpoint(path).ema
    with pytest.raises(BidmError, match="alone"):
        load_checkpoint(path, ema=False)


def test_options_of_the_network(tmp_path: Path) -> None:
    fixed = load_checkpoint(_save(tmp_path, _state(out_channels=4, patch_size=4, mlp_width=96)))
    assert fixed.convention.variance == "large" and fixed.sample_shape == (4, 8, 8)
    pixels = load_checkpoint(_save(tmp_path, _state(in_channels=3, out_channels=6)))
    assert pixels.sample_shape == (3, 8, 8) and not any("sd-vae" in note for note in pixels.evidence)


def test_no_null_label_where_none_was_trained(tmp_path: Path) -> None:
    path = _save(tmp_path, _state())
    config = _config(tmp_path, {"hidden_size": 64, "num_heads": 1, "num_classes": 11})
    checkpoint = load_checkpoint(path, config=config)
    assert (checkpoint.null_label, checkpoint.num_classes) == (None, 11)


def test_safetensors(tmp_path: Path) -> None:
    save_file(_state(), str(tmp_path / "model.safetensors"))
    assert load_checkpoint(tmp_path / "model.safetensors").family == "dit"


def test_bare_configurations(original: Callable[[str], Path], tmp_path: Path) -> None:
    folder = original("dit")
    bare, full = load_architecture(folder / "hparams.json"), load_checkpoint(folder / "DiT-tiny-plain.pt")
    assert bare.metadata() == full.metadata() and not bare.has_weights
    options = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 1000}
    named = load_architecture(_config(tmp_path, options))
    assert sum(parameter.numel() for parameter in named.unet.parameters()) == 675_129_632


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"depth": 3}, "depth is 3, but the weights have 2"),
        ({"num_heads": 3}, "heads"),
        ({"num_heads": 0}, "1 to 1024"),
        ({"num_heads": "many"}, "must be a number"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    path = _save(tmp_path, _state())
    config = _config(tmp_path, {"hidden_size": 64, "num_heads": 1, **change})
    with pytest.raises(BidmError, match=word) as caught:
        load_checkpoint(path, config=config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda state: state.pop("pos_embed"),
        lambda state: state.update(pos_embed=torch.zeros(1, 15, 64)),
        lambda state: state.update(pos_embed=torch.zeros(())),
        lambda state: state.pop("blocks.1.attn.qkv.bias"),
        lambda state: state.pop("y_embedder.embedding_table.weight"),
        lambda state: state.update({"final_layer.linear.weight": torch.zeros(30, 64)}),
        lambda state: state.update({"x_embedder.proj.weight": torch.zeros(64, 4, 2)}),
        lambda state: state.update({"x_embedder.proj.weight": torch.zeros(64, 4, 0, 0)}),
        lambda state: state.update({"blocks.999999999.attn.qkv.bias": torch.zeros(3)}),
    ],
)
def test_damaged_files(tmp_path: Path, break_it: Any) -> None:
    state = _state()
    break_it(state)
    with pytest.raises(BidmError) as caught:
        load_checkpoint(_save(tmp_path, state))
    assert "model.pt" in str(caught.value) and "\n" not in str(caught.value)
