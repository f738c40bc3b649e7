from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.checkpoints.reading.unpickle import read_file
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import (
    DDIM_CONFIG,
    DDPM_UNET,
    LDM_UNET,
    assert_close,
    evaluate,
    ldm_config,
    ldm_state,
    weights,
)

ORIGINALS = ["ldm_unconditional_vq4", "ldm_class_conditional"]


def _save(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def _notes(checkpoint: Checkpoint) -> str:
    return "\n".join(checkpoint.evidence)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("with_config", [True, False])
def test_originals_agree_with_the_original_code(
    original: Callable[[str], Path], tmp_path: Path, name: str, with_config: bool
) -> None:
    path = original(name) / "model.ckpt"
    if not with_config:
        path = Path(shutil.copy(path, tmp_path))
    ref = dict(np.load(original(name) / "ref.npz"))
    checkpoint = load_checkpoint(path)
    assert checkpoint.family == "ldm"
    assert_close(evaluate(checkpoint, ref), ref["eps"])
    assert_close(evaluate(load_checkpoint(path, ema=False), ref), ref["eps_raw"])
    assert_close(checkpoint.decode(torch.from_numpy(ref["z"])), ref["decoded_z"])
    assert_close(checkpoint.encode(torch.from_numpy(ref["img"])), ref["encoded_img"])
    assert checkpoint.schedule.description == {
        "kind": "scaled_linear",
        "timesteps": 1000,
        "start": 0.0015,
        "end": 0.0195,
    }
    assert checkpoint.sample_shape == ((3, 16, 16) if with_config else (3, 64, 64))
    assert ("assumed" in _notes(checkpoint)) == (not with_config)
    assert not any(tensor.is_meta for tensor in checkpoint.unet.parameters())


def test_original_conventions_and_ema(original: Callable[[str], Path]) -> None:
    path = original("ldm_unconditional_vq4") / "model.ckpt"
    checkpoint, raw = load_checkpoint(path), load_checkpoint(path, ema=False)
    assert (checkpoint.ema, raw.ema) == (True, False)
    assert "EMA" in _notes(checkpoint)
    assert "PyTorch Lightning file, epoch 2, global step 4321" in _notes(checkpoint)
    convention = checkpoint.convention
    assert (convention.spacing, convention.final_alpha, convention.clip) == ("ldm", "first", "none")
    assert (convention.variance, convention.clip_ancestral) == ("small", False)
    assert (checkpoint.scale_factor, checkpoint.prediction) == (1.0, "epsilon")
    assert (checkpoint.num_classes, checkpoint.null_label) == (None, None)
    assert len(checkpoint.sha256) == 64


def test_original_class_embedder(original: Callable[[str], Path]) -> None:
    folder = original("ldm_class_conditional")
    checkpoint = load_checkpoint(folder / "model.ckpt")
    ref = np.load(folder / "ref.npz")
    # Its eleventh row was trained for "no class", which nothing in the file or its configuration says.
    assert (checkpoint.num_classes, checkpoint.null_label) == (11, None)
    context, y = checkpoint.embed_labels(torch.tensor([10, 10]))
    assert y is None
    assert context is not None
    assert_close(context, ref["uncond"], 1e-6)
    table, _ = checkpoint.embed_labels(torch.arange(10))
    assert table is not None
    for row in torch.from_numpy(ref["cond"]):
        assert (table - row).abs().amax(dim=(1, 2)).min() == 0


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize(
    "variant",
    ["pruned", "bare", "module", "safetensors", "plain layout", "half", "no first stage", "U-Net alone"],
)
def test_variants_of_the_originals(
    original: Callable[[str], Path], tmp_path: Path, name: str, variant: str
) -> None:
    folder = original(name)
    ref = dict(np.load(folder / "ref.npz"))
    state = read_file(folder / "model.ckpt")["state_dict"]
    path = tmp_path / "model.ckpt"
    if variant == "pruned":
        torch.save({"state_dict": {k: v for k, v in state.items() if "model_ema" not in k}}, path)
    elif variant == "bare":
        torch.save(state, path)
    elif variant == "module":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    elif variant == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file({k: v.clone() for k, v in state.items()}, str(path))
    elif variant == "plain layout":
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    elif variant == "half":
        torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    elif variant == "no first stage":
        torch.save({k: v for k, v in state.items() if "first_stage" not in k}, path)
    else:
        prefix = "model.diffusion_model."
        torch.save({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, path)
    checkpoint = load_checkpoint(path, config=folder / "config.yaml")
    averaged = name == ORIGINALS[0] and variant not in ("pruned", "U-Net alone")
    assert checkpoint.ema == averaged
    tolerance = 2e-2 if variant == "half" else 1e-4
    assert_close(evaluate(checkpoint, ref), ref["eps" if averaged else "eps_raw"], tolerance)
    assert checkpoint.unet.get_parameter("out.2.weight").dtype == torch.float32
    assert checkpoint.schedule.description["kind"] == "scaled_linear"
    assert checkpoint.schedule.description["end"] == 0.0195
    assert (checkpoint.first_stage is None) == (variant in ("no first stage", "U-Net alone"))


def test_kl_first_stage_and_scale_factor_buffer(tmp_path: Path) -> None:
    state = ldm_state() | {"scale_factor": torch.tensor(0.25)}
    path = _save(tmp_path, state)
    for config in (
        None,
        ldm_config(tmp_path, lambda params: params.update(scale_by_std=True, scale_factor=3.0)),
    ):
        checkpoint = load_checkpoint(path, config=config)
        assert checkpoint.scale_factor == 0.25
        assert checkpoint.architecture["first_stage"]["kind"] == "kl_first_stage"
        images = torch.rand(1, 3, 16, 16) * 2 - 1
        z = checkpoint.encode(images)
        assert torch.equal(z, checkpoint.encode(images))
        torch.testing.assert_close(z, checkpoint.first_stage.encode(images) * 0.25)  # type: ignore
        assert checkpoint.decode(z).shape == images.shape
    assert checkpoint.sample_shape == (4, 8, 8)


def test_scale_factor_without_buffer(tmp_path: Path) -> None:
    path = _save(tmp_path, ldm_state())
    assert load_checkpoint(path).scale_factor == 1.0
    config = ldm_config(tmp_path, lambda params: params.update(scale_factor=0.18215))
    assert load_checkpoint(path, config=config).scale_factor == 0.18215
    for bad in (0.0, float("nan"), float("inf")):
        path = _save(tmp_path, ldm_state() | {"scale_factor": torch.tensor(bad)})
        with pytest.raises(BidmError, match="scale factor"):
            load_checkpoint(path)


def test_ema_by_shortened_names(tmp_path: Path) -> None:
    path = _save(tmp_path, ldm_state(ema=True))
    averaged, trained = load_checkpoint(path), load_checkpoint(path, ema=False)
    for name, tensor in weights("ldm_unet", LDM_UNET, seed=1).items():
        assert torch.equal(averaged.unet.get_parameter(name), tensor)
    for name, tensor in weights("ldm_unet", LDM_UNET, seed=0).items():
        assert torch.equal(trained.unet.get_parameter(name), tensor)


def test_file_of_averages_alone(tmp_path: Path) -> None:
    state = {k: v for k, v in ldm_state(ema=True).items() if not k.startswith("model.")}
    path = _save(tmp_path, state)
    with pytest.raises(BidmError, match="`config`"):
        load_checkpoint(path)
    checkpoint = load_checkpoint(path, config=ldm_config(tmp_path))
    for name, tensor in weights("ldm_unet", LDM_UNET, seed=1).items():
        assert torch.equal(checkpoint.unet.get_parameter(name), tensor)
    with pytest.raises(BidmError, match="alone"):
        load_checkpoint(path, config=ldm_config(tmp_path), ema=False)


def test_partial_and_foreign_averages(tmp_path: Path) -> None:
    state = ldm_state(ema=True)
    del state["model_ema.diffusion_modelout2weight"]
    checkpoint = load_checkpoint(_save(tmp_path, state))
    assert "1 have no average" in _notes(checkpoint)
    assert torch.equal(
        checkpoint.unet.get_parameter("out.2.weight"), state["model.diffusion_model.out.2.weight"]
    )
    state["model_ema.diffusion_modelother"] = torch.ones(1)
    path = _save(tmp_path, state)
    with pytest.raises(BidmError, match=r"1 averaged.*model_ema\.diffusion_modelother"):
        load_checkpoint(path)
    assert not load_checkpoint(path, ema=False).ema


def test_a_context_makes_a_bare_unet_ldm(tmp_path: Path) -> None:
    unet = {**LDM_UNET, "use_spatial_transformer": True, "context_dim": 24, "num_heads": 8}
    torch.save(weights("ldm_unet", {**unet, "num_head_channels": -1}), tmp_path / "unet.pt")
    checkpoint = load_checkpoint(tmp_path / "unet.pt")
    assert checkpoint.family == "ldm"
    assert checkpoint.context_width == 24
    assert "U-Net alone" in _notes(checkpoint)


def test_bare_unet_needs_the_configuration(tmp_path: Path) -> None:
    torch.save(weights("ldm_unet", LDM_UNET), tmp_path / "unet.pt")
    assert load_checkpoint(tmp_path / "unet.pt").family == "openai"
    checkpoint = load_checkpoint(tmp_path / "unet.pt", config=ldm_config(tmp_path))
    assert checkpoint.schedule.description["end"] == 0.0155
    assert "no first stage" in _notes(checkpoint)


def test_what_does_not_fit_is_listed_in_one_line(tmp_path: Path) -> None:
    state = ldm_state()
    del state["model.diffusion_model.out.2.bias"]
    state["model.diffusion_model.extra.weight"] = torch.ones(1)
    state["model.diffusion_model.time_embed.2.bias"] = torch.ones(5)
    path = _save(tmp_path, state)
    for config in (None, ldm_config(tmp_path)):
        with pytest.raises(BidmError) as caught:
            load_checkpoint(path, config=config)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert "\n" not in message
        assert "1 missing: out.2.bias" in message
        assert "1 unexpected: extra.weight" in message
        assert "1 of another shape: time_embed.2.bias (file [5], network [128])" in message


def test_a_configuration_of_another_network(tmp_path: Path) -> None:
    def wider(params: dict[str, Any]) -> None:
        params["unet_config"]["params"]["channel_mult"] = [1, 3]

    config = ldm_config(tmp_path, wider)
    with pytest.raises(BidmError, match=r"U-Net's weights do not fit.*given\.yaml.*of another shape"):
        load_checkpoint(_save(tmp_path, ldm_state()), config=config)

    def deeper(params: dict[str, Any]) -> None:
        params["first_stage_config"]["params"]["ddconfig"]["num_res_blocks"] = 2

    with pytest.raises(BidmError, match=r"first stage's weights do not fit.*missing"):
        load_checkpoint(_save(tmp_path, ldm_state()), config=ldm_config(tmp_path, deeper))


def test_a_configuration_of_another_family(tmp_path: Path) -> None:
    (tmp_path / "ddim.yml").write_text(yaml.safe_dump(DDIM_CONFIG))
    with pytest.raises(BidmError, match=r"ddim\.yml is for DDPM.*family ldm"):
        load_checkpoint(_save(tmp_path, ldm_state()), config=tmp_path / "ddim.yml")


def test_only_cin256_has_a_null_class(tmp_path: Path) -> None:
    unet = {
        **LDM_UNET,
        "use_spatial_transformer": True,
        "context_dim": 8,
        "num_head_channels": -1,
        "num_heads": 1,
    }
    for rows, null in ((1000, None), (1001, 1000), (7, None)):
        state = ldm_state(unet=unet) | {"cond_stage_model.embedding.weight": torch.randn(rows, 8)}
        checkpoint = load_checkpoint(_save(tmp_path, state))
        assert (checkpoint.num_classes, checkpoint.null_label) == (rows, null)


def test_concatenated_conditions_are_noted(tmp_path: Path) -> None:
    unet = {**LDM_UNET, "in_channels": 7}
    checkpoint = load_checkpoint(_save(tmp_path, ldm_state(unet=unet)))
    assert checkpoint.sample_shape[0] == 4
    assert checkpoint.concat_channels == 3
    assert "concatenation" in _notes(checkpoint)


def test_text_models_need_a_context(tmp_path: Path) -> None:
    unet = {
        **LDM_UNET,
        "use_spatial_transformer": True,
        "context_dim": 8,
        "num_head_channels": -1,
        "num_heads": 8,
    }
    state = ldm_state(unet=unet) | {"cond_stage_model.transformer.x.weight": torch.ones(2)}
    checkpoint = load_checkpoint(_save(tmp_path, state))
    assert checkpoint.num_classes is None
    assert checkpoint.conditioner is None
    assert "context of width 8" in _notes(checkpoint)


def test_pixel_models_with_the_ddpm_unet(tmp_path: Path) -> None:
    raw = weights("ddpm_unet", DDPM_UNET)
    state = {f"model.diffusion_model.{k}": v for k, v in raw.items()}
    checkpoint = load_checkpoint(_save(tmp_path, state))
    assert checkpoint.architecture["unet"]["kind"] == "ddpm_unet"
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(checkpoint.decode(x), x)

    def pixel(params: dict[str, Any]) -> None:
        target = "ldm.modules.diffusionmodules.model.Model"
        arguments = {**DDIM_CONFIG["model"], "resolution": 16}
        params.update(channels=3, unet_config={"target": target, "params": arguments})

    config = ldm_config(tmp_path, pixel)
    again = load_checkpoint(_save(tmp_path, state), config=config)
    assert again.architecture["unet"]["args"]["attention_levels"] == [1]
    with torch.no_grad():
        t = torch.tensor([5])
        assert torch.equal(checkpoint.denoise(x, t), again.denoise(x, t))
