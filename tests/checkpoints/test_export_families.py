"""Every family comes back through load_checkpoint as the packed file's float weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.export import export_checkpoint
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.unpack import float_weights
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe
from tests.checkpoints.conftest import DDPM_UNET
from tests.checkpoints.test_lucidrains import _wrapped
from tests.checkpoints.test_wrappers import DIT, LUCIDRAINS

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"
UVIT = {
    "img_size": 8, "patch_size": 2, "in_chans": 4, "embed_dim": 64, "half_depth": 2, "num_heads": 2,
    "mlp_width": 128, "label_rows": 4, "qkv_bias": True, "mlp_time_embed": True,
}  # fmt: skip
W86 = {"timesteps": 50, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1]}
OPENAI = {
    "in_channels": 3, "out_channels": 6, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2],
    "attention_resolutions": [2], "num_head_channels": 16, "use_new_attention_order": True, "num_classes": 5,
    "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
SCORE = {
    "in_channels": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1],
    "kind": "biggan", "skip_rescale": True, "fir": True, "input_pyramid": True,
}  # fmt: skip
COSINE = {"beta_schedule": "cosine", "timesteps": 400, "rescale_timesteps": True, "prediction": "x0"}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "openai": ("ldm_unet", OPENAI, {"use_new_attention_order": True, "num_head_channels": 16}),
    "openai cosine": ("ldm_unet", OPENAI, COSINE),
    "w86763777": ("w86_unet", W86, {"beta_end": 0.03, "variance": "small", "image_size": 16}),
    "dit": ("dit", DIT, {"num_heads": 4}),
    "dit no null": ("dit", DIT, {"null_label": None}),
    "uvit": ("uvit", UVIT, {"num_heads": 2, "null_label": None}),
    "score-sde": ("score_unet", SCORE, {"image_size": 16, "dropout": 0.0}),
    "lucidrains": ("lucidrains_unet", LUCIDRAINS, {"prediction": "x0", "image_size": [8, 16]}),
    "score-sde in [0, 1]": ("score_unet", SCORE, {"image_size": 16, "dropout": 0.0, "rescaled": False}),
    "lucidrains in [0, 1]": ("lucidrains_unet", LUCIDRAINS, {"image_size": 16, "rescaled": False}),
    "ddpm in [0, 1]": ("ddpm_unet", DDPM_UNET, {"image_size": 16, "rescaled": False}),
    "lucidrains cosine": ("lucidrains_unet", LUCIDRAINS, {"beta_schedule": "cosine", "timesteps": 60}),
}


def _packed(model: DiffusionModel, folder: Path) -> PackedModel:
    recipe = Recipe.load("xnor").override("first_stage", keep="both")
    binarize(model.unet, recipe, timesteps=model.schedule.timesteps)
    write_packed(folder / "m.bidm", *pack_model(model, recipe.to_json()))
    return load_packed(folder / "m.bidm", backend="torch")


def _same(back: DiffusionModel, opened: PackedModel) -> None:
    """Everything that sampling needs, and a step of both networks."""
    found, about = back.metadata(), opened.metadata()
    found_parts, parts = found.pop("architecture"), about.pop("architecture")
    assert found == about
    assert found_parts["first_stage"] == parts["first_stage"]
    # A configuration spells out more defaults than ours need.
    assert found_parts["unet"]["args"] | parts["unet"]["args"] == found_parts["unet"]["args"]
    expected = float_weights(opened)
    state = back.unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    network = build(parts["unet"])
    network.load_state_dict(expected)
    x, t = torch.randn(2, *opened.sample_shape), torch.tensor([3, 40])
    told = opened.example(2, None if opened.num_classes is None else torch.tensor([0, 2]))
    with torch.no_grad():
        simulated = network(told.join(x), opened.network_time(t), told.context, told.y)
        assert torch.equal(back.denoise(told.join(x), t, told.context, told.y), simulated)


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_through_load_checkpoint(name: str, tmp_path: Path) -> None:
    kind, arguments, settings = MODELS[name]
    torch.manual_seed(0)
    state = build({"kind": kind, "args": arguments}).state_dict()
    if kind == "lucidrains_unet":
        state = {f"model.{key}": value for key, value in state.items()}
    torch.save(state, tmp_path / "original.pt")
    model = load_checkpoint(tmp_path / "original.pt", settings=settings)
    opened = _packed(model, tmp_path)
    config = export_checkpoint(opened, tmp_path / "out" / "float.pt")
    assert config == tmp_path / "out" / "float.json"
    _same(load_checkpoint(tmp_path / "out" / "float.pt"), opened)


def test_a_layout_that_cannot_say_the_range_of_values(tmp_path: Path) -> None:
    torch.save(
        build({"kind": "dit", "args": {**DIT, "in_channels": 3, "out_channels": 3}}).state_dict(),
        tmp_path / "m.pt",
    )
    model = load_checkpoint(tmp_path / "m.pt", settings={"rescaled": False})
    with pytest.raises(BidmError, match=r"dit cannot say .* \[0, 1\]"):
        export_checkpoint(_packed(model, tmp_path), tmp_path / "float.pt")


def _old_lucidrains(folder: Path, version: str, **change: Any) -> DiffusionModel:
    """A model from before 1.8, whose attentions are wrapped."""
    torch.manual_seed(0)
    arguments = {**LUCIDRAINS, "norm": "group", "mem_kv": 0, "full_attn": [False, False], **change}
    state = _wrapped(build({"kind": "lucidrains_unet", "args": arguments}).state_dict())
    contents = {"model": {f"model.{key}": value for key, value in state.items()}, "version": version}
    torch.save(contents, folder / "original.pt")
    return load_checkpoint(folder / "original.pt", settings={"image_size": 8})


@pytest.mark.parametrize(("version", "written"), [("1.7.0", "1.7.3"), ("1.7.2", "1.7.3"), ("1.7.4", "1.8.0")])
def test_lucidrains_from_1_7_come_back(version: str, written: str, tmp_path: Path) -> None:
    opened = _packed(_old_lucidrains(tmp_path, version, attn_dim_head=[32, 32]), tmp_path)
    export_checkpoint(opened, tmp_path / "float.pt")
    contents = torch.load(tmp_path / "float.pt", weights_only=True)
    assert contents["version"] == written
    assert ("model.downs.0.2.fn.fn.to_qkv.weight" in contents["model"]) == (written == "1.7.3")
    _same(load_checkpoint(tmp_path / "float.pt"), opened)


def test_lucidrains_before_1_7_cannot_hold_binary_weights(tmp_path: Path) -> None:
    wide = {"attention_norm": "layer", "attn_dim_head": [32, 32]}
    opened = _packed(_old_lucidrains(tmp_path, "1.6.4", **wide), tmp_path)
    with pytest.raises(BidmError, match="standardizes the convs' weights"):
        export_checkpoint(opened, tmp_path / "float.pt")


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("guided_diffusion", "ema_0.9999_000010.pt"),
        ("lucidrains_v2", "model-1.pt"),
        ("dit", "DiT-tiny-plain.pt"),
        ("diffusers_ldm_vq", ""),
    ],
)
def test_originals_come_back(folder: str, file: str, tmp_path: Path) -> None:
    if not CHECKPOINTS.is_dir():
        pytest.skip("needs ../shared/checkpoints")
    opened = _packed(load_checkpoint(CHECKPOINTS / folder / file), tmp_path)
    export_checkpoint(opened, tmp_path / "float")
    back = load_checkpoint(tmp_path / "float")
    _same(back, opened)
    z = torch.randn(1, *opened.sample_shape)
    assert torch.allclose(back.decode(z), opened.decode(z), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 3, "attention_head_dim": None},
        {
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "downsample_padding": 0,
            "norm_eps": 1e-6,
            "dropout": 0.1,
        },
        {"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"], "add_attention": False},
    ],
)
def test_a_diffusers_folder_says_every_setting(change: dict[str, Any], tmp_path: Path) -> None:
    from tests.checkpoints.test_diffusers import _folder

    root = _folder(tmp_path, first_stage=True, **change)
    scheduler = {"_class_name": "DDPMScheduler", "trained_betas": [0.001 * (i + 1) for i in range(60)]}
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    opened = _packed(load_checkpoint(root), tmp_path)
    export_checkpoint(opened, tmp_path / "float")
    _same(load_checkpoint(tmp_path / "float"), opened)


def test_what_a_layout_cannot_say_is_one_clear_error(tmp_path: Path) -> None:
    torch.save(build({"kind": "dit", "args": DIT}).state_dict(), tmp_path / "original.pt")
    model = load_checkpoint(tmp_path / "original.pt", settings={"beta_schedule": "cosine"})
    with pytest.raises(BidmError, match="noise schedule"):
        export_checkpoint(_packed(model, tmp_path), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
