from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from bidm_cli.checkpoints.families.ddpm import infer_ddpm_unet
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.state import on_meta, shapes_of
from bidm_cli.checkpoints.reading.unpickle import read_file
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import DDIM_CONFIG, DDPM_UNET, assert_close, evaluate, weights
from tests.networks.published import DDPM_UNETS

OPTIMIZER: dict[str, Any] = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


def _raw() -> dict[str, torch.Tensor]:
    return weights("ddpm_unet", DDPM_UNET, seed=0)


def _averaged() -> dict[str, torch.Tensor]:
    return weights("ddpm_unet", DDPM_UNET, seed=1)


def _save(tmp_path: Path, contents: Any) -> Path:
    torch.save(contents, tmp_path / "ckpt.pth")
    return tmp_path / "ckpt.pth"


def _config(tmp_path: Path, **sections: dict[str, Any]) -> Path:
    values = copy.deepcopy(DDIM_CONFIG)
    for name, change in sections.items():
        values[name].update(change)
    (tmp_path / "given.yml").write_text(yaml.safe_dump(values))
    return tmp_path / "given.yml"


def _is(checkpoint: Any, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(checkpoint.unet.get_parameter(name), value) for name, value in state.items())


@pytest.mark.parametrize("with_config", [True, False])
def test_original_agrees_with_the_original_code(
    original: Callable[[str], Path], tmp_path: Path, with_config: bool
) -> None:
    folder = original("ddpm_ermongroup")
    path = folder / "ckpt.pth"
    if not with_config:
        path = Path(shutil.copy(path, tmp_path))
    ref = dict(np.load(folder / "ref.npz"))
    averaged, trained = load_checkpoint(path), load_checkpoint(path, ema=False)
    assert (averaged.family, averaged.ema, trained.ema) == ("ddpm", True, False)
    assert_close(evaluate(averaged, ref), ref["eps_ema"])
    assert_close(evaluate(trained, ref), ref["eps_raw"])
    assert averaged.sample_shape == ((3, 16, 16) if with_config else (3, 32, 32))
    convention = averaged.convention
    assert (convention.spacing, convention.final_alpha, convention.clip) == ("ddim", "one", "none")
    assert (convention.variance, convention.clip_ancestral) == ("ddim_noisy", True)
    assert averaged.schedule.description["kind"] == "linear"


def test_original_as_a_bare_state_dict(original: Callable[[str], Path], tmp_path: Path) -> None:
    folder = original("ddpm_ermongroup")
    ref = dict(np.load(folder / "ref.npz"))
    averaged = read_file(folder / "ckpt.pth")[4]
    torch.save(averaged, tmp_path / "model.ckpt")
    save_file({k: v.clone() for k, v in averaged.items()}, str(tmp_path / "model.safetensors"))
    for name in ("model.ckpt", "model.safetensors"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert_close(evaluate(checkpoint, ref), ref["eps_ema"])
        assert checkpoint.convention.variance == "large"


@pytest.mark.parametrize(
    ("wrap", "ema_used"),
    [
        (lambda raw, ema: [raw, OPTIMIZER, 3, 1234, ema], True),
        (lambda raw, ema: [{f"module.{k}": v for k, v in raw.items()}, OPTIMIZER, 3, 1234, ema], True),
        (lambda raw, ema: [raw, OPTIMIZER, 3, 1234], False),
        (lambda raw, ema: raw, False),
        (lambda raw, ema: {"state_dict": raw}, False),
        (lambda raw, ema: {"model": raw, "optimizer": OPTIMIZER, "step": 3}, False),
        (lambda raw, ema: {"model": raw, "model_ema": ema}, True),
        (lambda raw, ema: {"ema_model": ema, "net_model": raw}, True),
        (lambda raw, ema: {"ema": {"shadow": ema}, "model": raw}, True),
    ],
)
def test_containers(tmp_path: Path, wrap: Any, ema_used: bool) -> None:
    path = _save(tmp_path, wrap(_raw(), _averaged()))
    preferred, trained = load_checkpoint(path), load_checkpoint(path, ema=False)
    assert preferred.ema == ema_used
    assert _is(preferred, _averaged() if ema_used else _raw())
    assert not trained.ema
    assert _is(trained, _raw())


def test_averages_alone(tmp_path: Path) -> None:
    path = _save(tmp_path, {"ema": _averaged()})
    assert load_checkpoint(path).ema
    with pytest.raises(BidmError, match="alone"):
        load_checkpoint(path, ema=False)


def test_averages_by_the_name_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ema_diffusion_cifar10_model"
    folder.mkdir()
    assert load_checkpoint(_save(folder, _raw())).ema
    other = tmp_path / "cinema"
    other.mkdir()
    assert not load_checkpoint(_save(other, _raw())).ema


@pytest.mark.parametrize("name", DDPM_UNETS)
def test_published_networks_are_recognised(name: str) -> None:
    architecture, _ = DDPM_UNETS[name]
    found = infer_ddpm_unet(shapes_of(on_meta(architecture).state_dict()))
    assert architecture["args"].items() <= found.items()


@pytest.mark.parametrize(
    "option",
    [
        {"resamp_with_conv": False},
        {"conv_shortcut": True},
        {"attention_levels": []},
        {"attention_levels": [0, 1]},
        {"num_res_blocks": 3},
        {"ch_mult": [2], "attention_levels": [0]},
        {"in_channels": 1, "out_channels": 2},
    ],
)
def test_inferred_as_built(option: dict[str, Any]) -> None:
    arguments = {**DDPM_UNET, **option}
    found = infer_ddpm_unet(shapes_of(on_meta({"kind": "ddpm_unet", "args": arguments}).state_dict()))
    assert arguments.items() <= found.items()


@pytest.mark.parametrize(
    ("levels", "mult", "size", "variance"),
    [
        ([1], [1, 2], 32, "large"),
        ([2], [1, 1, 1], 64, "large"),
        ([4], [1] * 5, 256, "small"),
        ([], [1, 1], 32, "large"),
    ],
)
def test_size_and_variance_are_assumed_aloud(
    tmp_path: Path, levels: list[int], mult: list[int], size: int, variance: str
) -> None:
    state = weights("ddpm_unet", {**DDPM_UNET, "attention_levels": levels, "ch_mult": mult})
    checkpoint = load_checkpoint(_save(tmp_path, state))
    assert checkpoint.sample_shape == (3, size, size)
    assert checkpoint.convention.variance == variance
    assert sum("assumed" in note for note in checkpoint.evidence) == 3


def test_configuration_decides(tmp_path: Path) -> None:
    config = _config(tmp_path, diffusion={"num_diffusion_timesteps": 50, "beta_end": "1e-2"})
    checkpoint = load_checkpoint(_save(tmp_path, _raw()), config=config)
    assert checkpoint.sample_shape == (3, 16, 16)
    assert checkpoint.schedule.description == {"kind": "linear", "timesteps": 50, "start": 1e-4, "end": 1e-2}
    assert checkpoint.convention.variance == "ddim_noisy"
    assert checkpoint.architecture["unet"]["args"]["dropout"] == 0.1
    assert not any("assumed" in note for note in checkpoint.evidence)


@pytest.mark.parametrize("kind", ["linear", "quad", "const", "jsd", "sigmoid"])
def test_schedules(tmp_path: Path, kind: str) -> None:
    config = _config(tmp_path, diffusion={"beta_schedule": kind, "num_diffusion_timesteps": 30})
    # The last beta of jsd is 1; alphas_cumprod is then 0, and x0 by the noise not defined.
    settings = {"prediction": "epsilon"} if kind == "jsd" else {}
    betas = load_architecture(config, settings=settings).schedule.betas.numpy()
    start, end, steps = 1e-4, 0.02, 30
    x = np.linspace(-6, 6, steps)
    expected = {
        "linear": np.linspace(start, end, steps),
        "quad": np.linspace(start**0.5, end**0.5, steps) ** 2,
        "const": end * np.ones(steps),
        "jsd": 1 / np.linspace(steps, 1, steps),
        "sigmoid": 1 / (np.exp(-x) + 1) * (end - start) + start,
    }[kind]
    np.testing.assert_allclose(betas, expected, rtol=1e-9)


def test_the_variance_parameter_of_bayesian_models_is_left_out(tmp_path: Path) -> None:
    state = _raw() | {"logvar": torch.zeros(1000)}
    assert _is(load_checkpoint(_save(tmp_path, state)), _raw())


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = _raw() | {"extra.weight": torch.ones(1)}
    del state["mid.attn_1.q.bias"]
    with pytest.raises(BidmError, match=r"1 missing: mid\.attn_1\.q\.bias; 1 unexpected: extra\.weight"):
        load_checkpoint(_save(tmp_path, state))
    config = _config(tmp_path, model={"ch_mult": [1, 4]})
    with pytest.raises(BidmError, match=r"given\.yml.*of another shape"):
        load_checkpoint(_save(tmp_path, _raw()), config=config)


@pytest.mark.parametrize("flat", [True, False])
def test_json_of_pessers_constructor_arguments(tmp_path: Path, flat: bool) -> None:
    unet = {
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
    }
    diffusion = {"beta_0": 1e-4, "beta_T": 0.01, "T": 40, "model_var_type": "fixedsmall"}
    values = {**unet, **diffusion} if flat else {"unet": unet, "diffusion": diffusion}
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    checkpoint = load_checkpoint(_save(tmp_path, _raw()), config=tmp_path / "arguments.json")
    assert checkpoint.sample_shape == (3, 16, 16)
    assert checkpoint.schedule.timesteps == 40
    assert checkpoint.convention.variance == "small"


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("model", {"ch": "wide"}, "ch must be"),
        ("model", {"ch": 0}, "above 0"),
        ("model", {"ch_mult": []}, "cannot build"),
        ("data", {"image_size": -4}, "image_size must be an image size"),
        ("diffusion", {"beta_schedule": "magic"}, "beta_schedule"),
        ("diffusion", {"beta_end": 3.0}, "no noise schedule"),
        ("diffusion", {"num_diffusion_timesteps": 10**9}, "no noise schedule"),
        ("model", {"num_res_blocks": 10**9}, "at most"),
    ],
)
def test_bad_settings(tmp_path: Path, section: str, change: dict[str, Any], word: str) -> None:
    config = _config(tmp_path, **{section: change})
    with pytest.raises(BidmError, match=word) as caught:
        load_architecture(config)
    assert str(config) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bare_configuration(original: Callable[[str], Path]) -> None:
    folder = original("ddpm_ermongroup")
    bare, full = load_architecture(folder / "config.yml"), load_checkpoint(folder / "ckpt.pth")
    assert bare.metadata() == full.metadata()
    assert not bare.has_weights
    assert all(parameter.is_meta for parameter in bare.unet.parameters())
