"""Settings around the network that change what numbers mean: honoured, or said to be passed over."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import caveats
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.value_range import value_range
from bidm_cli.errors import BidmError
from bidm_cli.networks.value_range import ValueRange
from bidm_cli.sampling.sample import sample
from tests.checkpoints.conftest import DDIM_CONFIG, DDPM_UNET, LDM_UNET, ldm_config, weights
from tests.checkpoints.test_wrappers import LUCIDRAINS


def _left_out(model: Checkpoint) -> list[str]:
    return [note for note in caveats(model.evidence) if note.kind == "left out"]


def _ddim(tmp_path: Path, **data: Any) -> Checkpoint:
    torch.save(weights("ddpm_unet", DDPM_UNET), tmp_path / "ckpt.pth")
    (tmp_path / "config.yml").write_text(
        yaml.safe_dump({**DDIM_CONFIG, "data": {**DDIM_CONFIG["data"], **data}})
    )
    return load_checkpoint(tmp_path / "ckpt.pth")


def _lucidrains(tmp_path: Path, **diffusion: Any) -> Checkpoint:
    torch.save(weights("lucidrains_unet", LUCIDRAINS), tmp_path / "m.pt")
    values = {"unet": {"dim": 16, "dim_mults": [1, 2]}, "diffusion": {"image_size": 16, **diffusion}}
    (tmp_path / "m.json").write_text(json.dumps(values))
    return load_checkpoint(tmp_path / "m.pt")


def _score_sde(tmp_path: Path, **data: Any) -> Checkpoint:
    model = {"name": "ddpm", "nf": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
    values = {"model": model, "data": {"image_size": 16, **data}, "training": {"sde": "vpsde"}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    return load_architecture(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("load", "setting", "word"),
    [(_ddim, {"rescaled": False}, "rescaled"), (_lucidrains, {"auto_normalize": False}, "auto_normalize"),
     (_score_sde, {"centered": False}, "centered")],
)  # fmt: skip
def test_images_in_0_to_1(tmp_path: Path, load: Any, setting: dict[str, Any], word: str) -> None:
    usual = load(tmp_path)
    assert value_range(usual) is None
    model = load(tmp_path, **setting)
    assert value_range(model) == "unit"
    assert any(word in note and "rescaled=true" in note for note in model.evidence)
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert model.encode(images).flatten().tolist() == [0.0, 0.5, 1.0]
    assert torch.equal(model.decode(model.encode(images)), images)


def test_logits(tmp_path: Path) -> None:
    model = _ddim(tmp_path, rescaled=False, logit_transform=True)
    assert value_range(model) == "logit"
    images = torch.linspace(-1, 1, 9).reshape(1, 1, 3, 3)
    unit = (images + 1) / 2 * (1 - 2e-6) + 1e-6
    torch.testing.assert_close(model.encode(images), torch.log(unit) - torch.log1p(-unit))
    torch.testing.assert_close(model.decode(model.encode(images)), images, atol=1e-5, rtol=0)
    both = _ddim(tmp_path, rescaled=True, logit_transform=True)
    assert value_range(both) is None
    assert any("logit_transform" in note for note in _left_out(both))


def test_ranges_by_hand(tmp_path: Path) -> None:
    _ddim(tmp_path, rescaled=False)
    path = tmp_path / "ckpt.pth"
    assert value_range(load_checkpoint(path, settings={"rescaled": True})) is None
    (tmp_path / "config.yml").unlink()
    assert value_range(load_checkpoint(path, settings={"rescaled": False})) == "unit"
    with pytest.raises(BidmError, match="true or false"):
        load_checkpoint(path, settings={"rescaled": "so"})
    with pytest.raises(BidmError, match="first stage"):
        load_architecture(ldm_config(tmp_path), settings={"rescaled": False})
    with pytest.raises(ValueError, match="byte"):
        ValueRange("byte")


def test_samples_are_mapped_to_images(tmp_path: Path) -> None:
    unit = _ddim(tmp_path, rescaled=False)
    signed = load_checkpoint(tmp_path / "ckpt.pth", settings={"rescaled": True})
    values = [sample(model, n=1, steps=2, seed=0, batch_size=1) for model in (unit, signed)]
    assert torch.equal(*values)
    assert torch.equal(signed.decode(values[1]), values[1])
    assert torch.equal(unit.decode(values[0]), 2 * values[0] - 1)


@pytest.mark.parametrize("name", ["uniform_dequantization", "gaussian_dequantization", "odd_setting"])
def test_other_settings_of_the_data_are_said(tmp_path: Path, name: str) -> None:
    assert not _left_out(_ddim(tmp_path, num_workers=4, random_flip=True, **{name: False}))
    (note,) = _left_out(_ddim(tmp_path, **{name: True}))
    assert name in note


def test_channels_follow_the_network(tmp_path: Path) -> None:
    torch.save(
        weights("ddpm_unet", {**DDPM_UNET, "in_channels": 1, "out_channels": 1}), tmp_path / "ckpt.pth"
    )
    model = {**DDIM_CONFIG["model"], "in_channels": 1, "out_ch": 1}
    (tmp_path / "config.yml").write_text(yaml.safe_dump({**DDIM_CONFIG, "model": model}))
    checkpoint = load_checkpoint(tmp_path / "ckpt.pth")
    assert checkpoint.sample_shape == (1, 16, 16)
    assert any("images of 3 channels" in note for note in _left_out(checkpoint))

    def change(params: dict[str, Any]) -> None:
        params["channels"] = 3

    ldm = load_architecture(ldm_config(tmp_path, change))
    assert ldm.sample_shape[0] == 4
    assert any("images of 3 channels" in note for note in _left_out(ldm))


@pytest.mark.parametrize(
    ("params", "word", "variance"),
    [
        ({"v_posterior": 0.0, "l_simple_weight": 1.0, "learn_logvar": True}, None, "small"),
        ({"v_posterior": 1.0}, None, "large"),
        ({"v_posterior": 0.3}, "v_posterior", "small"),
        ({"conditioning_key": "crossattn"}, None, "small"),
        ({"conditioning_key": "telepathy"}, "telepathy", "small"),
        ({"noise_offset": 0.1}, "noise_offset", "small"),
    ],
)
def test_settings_of_ldm(tmp_path: Path, params: dict[str, Any], word: str | None, variance: str) -> None:
    model = load_architecture(ldm_config(tmp_path, lambda values: values.update(params)))
    assert model.convention.variance == variance
    notes = _left_out(model)
    assert not notes if word is None else word in notes[0]


@pytest.mark.parametrize("name", ["rescale_betas_zero_snr", "zero_snr"])
def test_zero_terminal_snr_of_ldm(tmp_path: Path, name: str) -> None:
    config = ldm_config(tmp_path, lambda values: values.update({name: True, "parameterization": "v"}))
    schedule = load_architecture(config).schedule
    assert schedule.alphas_cumprod[-1] < 1e-10
    config = ldm_config(tmp_path, lambda values: values.update({name: True}))
    with pytest.raises(BidmError, match="zero terminal SNR"):
        load_architecture(config)
    assert load_architecture(config, settings={"prediction": "v"}).prediction == "v"


def test_betas_of_ldm(tmp_path: Path) -> None:
    config = ldm_config(tmp_path, lambda values: values.update(given_betas=[0.1, 0.2]))
    torch.testing.assert_close(
        load_architecture(config).schedule.alphas_cumprod, torch.tensor([0.9, 0.72], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("diffusion", "expected"),
    [
        ({"predict_xstart": True}, ("x0", "rederive")),
        ({"clip_denoised": False}, ("epsilon", "none")),
        ({"use_kl": True, "rescale_learned_sigmas": True}, ("epsilon", "rederive")),
    ],
)
def test_settings_of_openai(tmp_path: Path, diffusion: dict[str, Any], expected: tuple[str, str]) -> None:
    values = {"unet": LDM_UNET, "library": "guided", "image_size": 16}
    values["diffusion"] = {"steps": 100, "noise_schedule": "linear", **diffusion}
    (tmp_path / "a.json").write_text(json.dumps(values))
    model = load_architecture(tmp_path / "a.json")
    assert (model.prediction, model.convention.clip) == expected
    assert not caveats(model.evidence)


def test_settings_of_transformers(tmp_path: Path) -> None:
    dit = {"hidden_size": 64, "num_heads": 1, "depth": 1, "input_size": 8}
    dit |= {"predict_xstart": True, "noise_schedule": "squaredcos"}
    (tmp_path / "dit.json").write_text(json.dumps(dit))
    with pytest.raises(BidmError, match="squaredcos"):
        load_architecture(tmp_path / "dit.json")
    (tmp_path / "dit.json").write_text(json.dumps(dit | {"noise_schedule": "cosine", "diffusion_steps": 50}))
    model = load_architecture(tmp_path / "dit.json")
    assert (model.prediction, model.schedule.timesteps) == ("x0", 50)
    uvit = {
        "nnet": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 1},
        "pred": "x0_pred",
    }
    (tmp_path / "uvit.json").write_text(json.dumps(uvit))
    assert load_architecture(tmp_path / "uvit.json").prediction == "x0"


def test_a_schedule_that_is_said_in_part(tmp_path: Path) -> None:
    values = copy.deepcopy(DDIM_CONFIG)
    del values["diffusion"]["beta_end"]
    (tmp_path / "c.yml").write_text(yaml.safe_dump(values))
    notes = caveats(load_architecture(tmp_path / "c.yml").evidence)
    assert any(note.kind == "assumed" and note.startswith("beta_end") for note in notes)
