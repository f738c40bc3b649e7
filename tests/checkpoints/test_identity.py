"""What a model is: of latents or pixels, of noise or something else, with a null label or without."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import caveats
from bidm_cli.checkpoints.families.published import known_network
from bidm_cli.checkpoints.neighbours import neighbour_of, settings_of
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.distill.image_data import ImageData
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.images import decode, is_decodable
from bidm_cli.sampling.sample import clipping, sample
from tests.checkpoints.conftest import KL, LDM_UNET, ldm_config, ldm_state, weights
from tests.checkpoints.test_averages import DIFFUSERS, _diffusers
from tests.checkpoints.test_wrappers import DIT, LUCIDRAINS
from tests.conftest import Called

RGB = {**LDM_UNET, "in_channels": 3, "out_channels": 3}


def _save(folder: Path, contents: Any, name: str = "model.ckpt") -> Path:
    torch.save(contents, folder / name)
    return folder / name


def _stage(params: dict[str, Any]) -> None:
    """The first stage's latents have three channels."""
    params["channels"] = 3
    params["unet_config"] = {"target": "x.UNetModel", "params": RGB}
    params["first_stage_config"]["params"]["embed_dim"] = 3
    params["first_stage_config"]["params"]["ddconfig"]["z_channels"] = 3


def _without_stage(folder: Path, **more: Tensor) -> Path:
    return _save(folder, {"state_dict": ldm_state(unet=RGB, first_stage=None) | more})


def _refuses_images(checkpoint: Any, folder: Path) -> None:
    assert checkpoint.is_latent and not is_decodable(checkpoint)
    with pytest.raises(BidmError, match=r"first stage.*`first_stage`.*`raw`"):
        decode(checkpoint, torch.zeros(1, *checkpoint.sample_shape))
    (folder / "images").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "images" / "0.png")
    with pytest.raises(BidmError, match=r"no first stage.*`first_stage`"):
        ImageData(checkpoint, folder / "images", ConditionSet())
    assert sample(checkpoint, n=1, steps=1).shape[1:] == checkpoint.sample_shape


@pytest.mark.parametrize("how", ["configuration", "scale", "conditioner"])
def test_ldm_without_its_first_stage(tmp_path: Path, how: str) -> None:
    config, more = None, {}
    if how == "configuration":
        config = ldm_config(tmp_path, _stage)
    elif how == "scale":
        more = {"scale_factor": torch.tensor(0.2)}
    else:
        more = {"cond_stage_model.x.weight": torch.zeros(1)}
    checkpoint = load_checkpoint(_without_stage(tmp_path, **more), config=config, settings={"image_size": 8})
    _refuses_images(checkpoint, tmp_path)
    assert any("no first stage" in note and "`first_stage`" in note for note in caveats(checkpoint.evidence))


def test_a_pixel_model_of_ldm_stays_one(tmp_path: Path) -> None:
    assert not load_checkpoint(_without_stage(tmp_path), settings={"image_size": 8}).is_latent

    def identity(params: dict[str, Any]) -> None:
        _stage(params)
        params["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}

    config = ldm_config(tmp_path, identity)
    assert not load_checkpoint(_without_stage(tmp_path), config=config).is_latent
    named = load_checkpoint(
        _without_stage(tmp_path), config=ldm_config(tmp_path, _stage), settings={"latent": False}
    )
    assert not named.is_latent and is_decodable(named)
    with pytest.raises(BidmError, match="latent must be true"):
        load_checkpoint(_save(tmp_path, {"state_dict": ldm_state()}), settings={"latent": False})


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("known", [(3, None), (6, None), (7, None)])
def test_ldms_known_networks_are_of_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: tuple[int, Any], bare: bool
) -> None:
    from bidm_cli.checkpoints.families import published

    arguments = {**RGB, "in_channels": known[0]}
    key = (32, (1, 2), known[0], None)
    entry = next(item for item in published._LDM if item[0][2:] == known)[1]
    monkeypatch.setattr(published, "_LDM", ((key, entry),))
    assert known_network(arguments) is entry
    state = ldm_state(unet=arguments, first_stage=None)
    if bare:
        state = weights("ldm_unet", arguments)
    checkpoint = load_checkpoint(_save(tmp_path, state))
    assert (checkpoint.family, checkpoint.sample_shape[0]) == ("ldm", 3)
    assert checkpoint.is_latent and not is_decodable(checkpoint)
    assert any(note.kind == "assumed" and "latent=false" in note for note in caveats(checkpoint.evidence))
    assert load_checkpoint(tmp_path / "model.ckpt", family="openai").family == "openai" if bare else True


def test_the_packed_model_and_an_export_know_it(tmp_path: Path) -> None:
    path = _without_stage(tmp_path)
    checkpoint = load_checkpoint(path, config=ldm_config(tmp_path, _stage))
    pixels = load_checkpoint(path, config=ldm_config(tmp_path, _stage), settings={"latent": False})
    for model, latent in ((checkpoint, True), (pixels, False)):
        binarize(model.unet, Recipe.load("w1a1"), timesteps=1000)
        metadata, tensors = pack_model(model, Recipe.load("w1a1").to_json())
        assert ("latent" in metadata) == ("latent" in metadata["requires"]) == latent
        write_packed(tmp_path / "m.bidm", metadata, tensors)
        packed = load_packed(tmp_path / "m.bidm", backend="torch")
        assert packed.is_latent == latent and is_decodable(packed) != latent
        assert clipping(packed) == ("none" if latent else "rederive")
    _refuses_images(load_packed(_packed(tmp_path, checkpoint), backend="torch"), tmp_path)


def _packed(folder: Path, model: Checkpoint) -> Path:
    write_packed(folder / "n.bidm", *pack_model(model, Recipe.load("w1a1").to_json()))
    return folder / "n.bidm"


def test_a_first_stage_given_makes_images(tmp_path: Path) -> None:
    state = weights("kl_first_stage", {**KL, "embed_dim": 3, "z_channels": 3})
    stage = _save(tmp_path, {"state_dict": state}, "vae.ckpt")
    checkpoint = load_checkpoint(
        _without_stage(tmp_path), config=ldm_config(tmp_path, _stage), first_stage=stage
    )
    assert is_decodable(checkpoint) and "latent" not in checkpoint.metadata()
    assert not any("no first stage" in note for note in checkpoint.evidence)


@pytest.mark.parametrize("how", ["index", "LDM's"])
def test_diffusers_without_their_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from bidm_cli.checkpoints.families.diffusers import load

    raw = _diffusers(tmp_path / "unet")
    save_file(raw, str(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"))
    assert not load_checkpoint(tmp_path).is_latent
    if how == "index":
        index = {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"], "unet": ["diffusers", "x"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    else:
        same = ("_class_name", "block_out_channels", "sample_size", "attention_head_dim", "in_channels")
        monkeypatch.setattr(load, "_LDM_UNET", {name: DIFFUSERS[name] for name in same})
    checkpoint = load_checkpoint(tmp_path)
    _refuses_images(checkpoint, tmp_path)
    assert any("no first stage" in note for note in caveats(checkpoint.evidence))
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": [None, None]}))
    assert load_checkpoint(tmp_path).is_latent == (how != "index")


@pytest.mark.parametrize("vae", [True, False])
def test_dits_training_options_tell_latents(tmp_path: Path, vae: bool) -> None:
    state = weights("dit", {**DIT, "in_channels": 3, "out_channels": 3})
    options = {"model": "own", "num_classes": 3} | ({"vae": "ema"} if vae else {})
    path = _save(tmp_path, {"model": state, "args": argparse.Namespace(**options)})
    assert load_checkpoint(path).is_latent == vae


def test_commands_name_the_first_stage(tmp_path: Path, bidm: Callable[..., Called]) -> None:
    path = _without_stage(tmp_path, scale_factor=torch.tensor(0.2))
    options = [path, "-n", 1, "--steps", 1, "--set", "image_size=8", "--out", tmp_path / "out"]
    refused = bidm("sample", *options)
    assert refused.code == 1 and "--first-stage" in refused.err and not (tmp_path / "out").exists()
    drawn = bidm("sample", *options, "--raw")
    assert drawn.code == 0 and not list((tmp_path / "out").glob("*.png"))
    assert "works on pixels" not in bidm("inspect", path).out


@pytest.mark.parametrize("objective", [None, "pred_v", "pred_x0"])
def test_lucidrains_learned_variance_means_noise(tmp_path: Path, objective: str | None) -> None:
    state = {f"model.{n}": t for n, t in weights("lucidrains_unet", {**LUCIDRAINS, "out_dim": 6}).items()}
    alphas = torch.linspace(0.99, 0.01, 50)
    state |= {"alphas_cumprod": alphas, "loss_weight": alphas}  # v's
    path = _save(tmp_path, {"model": state, "version": "2.3.4"})
    config = None
    if objective is not None:
        config = tmp_path / "given.json"
        config.write_text(
            json.dumps({"unet": {"dim": 16, "dim_mults": [1, 2]}, "diffusion": {"objective": objective}})
        )
    checkpoint = load_checkpoint(path, config=config)
    assert (checkpoint.prediction, checkpoint.convention.variance) == ("epsilon", "learned_range")
    assert load_checkpoint(path, settings={"prediction": "v"}).prediction == "v"
    bare = tmp_path / "bare.json"
    bare.write_text(
        json.dumps({"dim": 16, "dim_mults": [1, 2], "learned_variance": True, "objective": "pred_v"})
    )
    assert load_architecture(bare).prediction == "epsilon"


def test_a_learned_variance_that_the_scheduler_does_not_name(tmp_path: Path) -> None:
    from bidm_cli.checkpoints.families.diffusers.config import unet_from_config
    from bidm_cli.checkpoints.reading.config import Section

    values = {**DIFFUSERS, "out_channels": 6}
    architecture = unet_from_config(Section(values, "test"))
    (tmp_path / "config.json").write_text(json.dumps(values))
    raw = weights(architecture["kind"], architecture["args"])
    save_file(raw, str(tmp_path / "diffusion_pytorch_model.safetensors"))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.convention.variance == "learned_range" and checkpoint.sample_shape[0] == 3
    assert any("learned variance" in note for note in caveats(checkpoint.evidence))
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    said = load_checkpoint(tmp_path)
    assert said.convention.variance == "learned"
    assert not any("learned variance" in note for note in caveats(said.evidence))


def test_ddpm_networks_of_a_learned_variance(tmp_path: Path) -> None:
    from tests.checkpoints.conftest import DDPM_UNET

    path = _save(tmp_path, weights("ddpm_unet", {**DDPM_UNET, "out_channels": 6}))
    checkpoint = load_checkpoint(path)
    assert (checkpoint.sample_shape[0], checkpoint.convention.variance) == (3, "learned_range")
    assert any("learned variance" in note for note in caveats(checkpoint.evidence))


DIT_ARGS = {"model": "DiT-S/2", "num_classes": 3, "vae": "ema", "image_size": 64}
NEIGHBOURS: dict[str, tuple[str, dict[str, Any]]] = {
    "SiT": ("model.pt", {"model": "SiT-XL/2", "num_classes": 3}),
    "SiT (": (
        "model.pt",
        {"model": "own", "path_type": "Linear", "prediction": "velocity", "num_classes": 3},
    ),
    "SiT (stochastic interpolants)": ("SiT-XL-2-256x256.pt", {}),
    "a rectified flow": ("model.pt", {"objective": "rectified_flow"}),
    "a flow matching model": ("otcfm_cifar10_weights_step_400000.pt", {}),
    "flow matching": ("model.pt", {"skewed_timesteps": True}),
    "a consistency model": ("model.pt", {"training_mode": "consistency_distillation"}),
    "EDM": ("model.pt", {"loss": {"class_name": "training.loss.EDMLoss"}}),
    "LightningDiT": ("lightningdit-xl-imagenet256-64ep.pt", {}),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file, options = NEIGHBOURS[name]
    contents: dict[str, Any] = {"model": weights("dit", DIT)}
    if options:
        contents["args"] = argparse.Namespace(**options)
    path = _save(tmp_path, contents, file)
    with pytest.raises(BidmError) as caught:
        load_checkpoint(path)
    assert name in str(caught.value) and "`family` dit" in str(caught.value)
    assert "\n" not in str(caught.value)
    forced = load_checkpoint(path, family="dit")
    assert any(name in note for note in caveats(forced.evidence))


@pytest.mark.parametrize("kind", ["beside", "given", "bare"])
def test_a_configuration_tells_a_neighbour(tmp_path: Path, kind: str) -> None:
    path = _save(tmp_path, weights("dit", DIT))
    config = tmp_path / ("config.json" if kind == "beside" else "given.json")
    config.write_text(json.dumps({"model": "SiT-XL/2", "num_classes": 3, "image_size": 64}))
    with pytest.raises(BidmError, match="SiT"):
        if kind == "bare":
            load_architecture(config)
        load_checkpoint(path, config=config if kind == "given" else None)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["projectors.0.0.weight"], "SiT"),
        (["blocks.0.mlp.w12.weight"], "LightningDiT"),
        (["t_block.1.weight"], "PixArt"),
        (["decoder_blocks.0.attn.qkv.weight"], "MaskDiT"),
    ],
)
def test_transformers_with_other_layers(tmp_path: Path, names: list[str], word: str) -> None:
    path = _save(tmp_path, weights("dit", DIT) | dict.fromkeys(names, torch.ones(1)))
    with pytest.raises(BidmError, match=word):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    ],
)
@pytest.mark.parametrize("name", ["", "diffusion_pytorch_model.safetensors"])
def test_schedulers_of_flows(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    save_file(_diffusers(tmp_path), str(tmp_path / "diffusion_pytorch_model.safetensors"))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(BidmError, match=r"flow|FlowMatch|EDM"):
        load_checkpoint(tmp_path / name)
    plain = {name: value for name, value in settings.items() if name != "_class_name"}
    if plain:
        assert load_checkpoint(tmp_path / name, family="diffusers").family == "diffusers"
        off = {**settings, **dict.fromkeys(plain, False if True in plain.values() else "discrete")}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(off))
        assert load_checkpoint(tmp_path / name).family == "diffusers"


def test_words_that_are_no_neighbours() -> None:
    names = ["university_sit.pt", "transit.ckpt", "ct_lung_ddpm.pt", "model.pt", "overflow.pt", "DiT-XL-2.pt"]
    assert all(neighbour_of(name) is None for name in names)
    values = {"data": "/home/me/flow_matching/data", "flow_matching": False, "reflow": 0, "v": {"x": None}}
    assert neighbour_of("x.pt", settings_of(values)) is None
    assert neighbour_of("x.pt", settings_of({"a": {"b": {"kind": "flow_matching"}}})) is not None
    endless: dict[str, Any] = {}
    endless["x"] = endless
    assert list(settings_of(endless)) == []


CLASSES = {
    **LDM_UNET,
    "use_spatial_transformer": True,
    "context_dim": 8,
    "num_head_channels": -1,
    "num_heads": 1,
}


def _embedder(rows: int, **more: Any) -> Callable[[dict[str, Any]], None]:
    def change(params: dict[str, Any]) -> None:
        target = "ldm.modules.encoders.modules.ClassEmbedder"
        settings = {"n_classes": rows, "embed_dim": 8, **more}
        params["cond_stage_config"] = {"target": target, "params": settings}
        params["unet_config"] = {"target": "x", "params": CLASSES}

    return change


@pytest.mark.parametrize(
    ("rows", "more", "null"),
    [(10, {}, None), (1001, {}, 1000), (10, {"ucg_rate": 0.1}, 9), (10, {"ucg_rate": 0}, None)],
)
def test_null_label_of_ldm(tmp_path: Path, rows: int, more: dict[str, Any], null: int | None) -> None:
    state = ldm_state(unet=CLASSES) | {"cond_stage_model.embedding.weight": torch.randn(rows, 8)}
    config = ldm_config(tmp_path, _embedder(rows, **more))
    path = _save(tmp_path, {"state_dict": state})
    checkpoint = load_checkpoint(path, config=config)
    assert (checkpoint.num_classes, checkpoint.null_label) == (rows, null)
    if null is None:
        with pytest.raises(BidmError, match=r"no null label.*`settings` null_label"):
            checkpoint.check_guidance()
    assert load_checkpoint(path, config=config, settings={"null_label": 2}).null_label == 2
    assert load_checkpoint(path, config=config, settings={"null_label": "none"}).null_label is None


@pytest.mark.parametrize(
    ("rows", "config", "null", "said"),
    [
        (4, {}, 3, "assumed"),
        (1001, {}, 1000, "known"),
        (4, {"num_classes": 3}, 3, "known"),
        (4, {"num_classes": 4}, None, "known"),
        (4, {"class_dropout_prob": 0.0}, None, "known"),
        (4, {"num_classes": 9}, 3, "assumed"),
    ],
)
def test_null_label_of_dit(
    tmp_path: Path, rows: int, config: dict[str, Any], null: int | None, said: str
) -> None:
    path = _save(tmp_path, weights("dit", {**DIT, "label_rows": rows}))
    if config:
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_heads": 1, **config}))
    checkpoint = load_checkpoint(path)
    assert (checkpoint.num_classes, checkpoint.null_label) == (rows, null)
    assert any("null_label=none" in note for note in caveats(checkpoint.evidence)) == (said == "assumed")
    assert load_checkpoint(path, settings={"null_label": "none"}).null_label is None


@pytest.mark.parametrize(("rows", "config", "said"), [(4, None, True), (1001, None, False), (4, True, False)])
def test_null_label_of_uvit(tmp_path: Path, rows: int, config: bool | None, said: bool) -> None:
    from tests.checkpoints.test_export_families import UVIT

    path = _save(tmp_path, weights("uvit", {**UVIT, "label_rows": rows}))
    if config is not None:
        (tmp_path / "config.json").write_text(
            json.dumps({"img_size": 8, "null_label": config, "num_heads": 2})
        )
    checkpoint = load_checkpoint(path, settings={"num_heads": 2})
    assert checkpoint.null_label == rows - 1
    assert any("null_label=none" in note for note in caveats(checkpoint.evidence)) == said
