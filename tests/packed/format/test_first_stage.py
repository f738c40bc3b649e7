"""First stages in packed files: parts that are kept, forms of their weights, and files that make no sense."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.export import export_checkpoint, first_stage_line
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.data.concat import channels_from
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.first_stage import FEWEST
from bidm_cli.packed.format.quantized import dequantize, quantize, stored_shapes
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench.models import paired
from bidm_cli.report.cost.cost import cost
from bidm_cli.report.cost.file_sizes import file_sizes
from bidm_cli.report.inspection import Inspection
from bidm_cli.sampling.sample import sample
from tests.checkpoints.conftest import KL
from tests.end_to_end.conditioned import checkpoint

UNET = {
    "in_channels": 4, "out_channels": 4, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
    "attention_levels": [],
}  # fmt: skip
DIFFUSERS = {"block_out_channels": [32, 32], "latent_channels": 4}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("vq_first_stage", {**KL, "n_embed": 16, "double_z": False}),
    "kl": ("kl_first_stage", {**KL, "double_z": True}),
    "diffusers vq": ("diffusers_vq", {**DIFFUSERS, "embed_dim": 4, "n_embed": 16}),
    "diffusers kl": ("diffusers_kl", DIFFUSERS),
    "diffusers kl without quant_conv": (
        "diffusers_kl",
        {**DIFFUSERS, "quant_conv": False, "post_quant_conv": False, "latents_mean": [0.5] * 4},
    ),
}  # fmt: skip
DECIBELS = {"int8": 35, "int6": 25, "float16": 45, "float32": 130}
"""At least, on random weights, whose pictures suffer more than a trained decoder's."""


def latent_model(name: str = "kl") -> DiffusionModel:
    torch.manual_seed(0)
    kind, arguments = STAGES[name]
    architecture = {
        "unet": {"kind": "ddpm_unet", "args": UNET},
        "first_stage": {"kind": kind, "args": arguments},
        "conditioner": None,
    }
    unet, stage = build(architecture["unet"]), build(architecture["first_stage"])
    binarize(unet, Recipe.load("w1a1"), timesteps=1000)
    schedule, family = NoiseSchedule.linear(1000, 1e-4, 0.02), "diffusers" if "diffusers" in name else "ldm"
    convention = SamplingConvention(spacing="leading" if family == "diffusers" else "ldm")
    more = {"first_stage": stage, "scale_factor": 0.5}
    return DiffusionModel(family, unet, (4, 8, 8), schedule, convention, architecture, **more)


def recipe_of(keep: str, weights: str) -> Recipe:
    return Recipe.load("w1a1").override("first_stage", keep=keep, weights=weights)


def packed(model: DiffusionModel, folder: Path, keep: str = "decoder", weights: str = "int8") -> PackedModel:
    write_packed(folder / "m.bidm", *pack_model(model, recipe_of(keep, weights).to_json()))
    return load_packed(folder / "m.bidm", backend="torch")


def pictures(model: DiffusionModel, z: torch.Tensor) -> torch.Tensor:
    return model.decode(z).clamp(-1, 1)


@pytest.mark.parametrize("weights", DECIBELS)
@pytest.mark.parametrize("keep", ["decoder", "both"])
@pytest.mark.parametrize("name", STAGES)
def test_pictures_are_the_original_s(name: str, keep: str, weights: str, tmp_path: Path) -> None:
    model = latent_model(name)
    opened = packed(model, tmp_path, keep, weights)
    z, images = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 16, 16) * 2 - 1
    error = float((pictures(opened, z) - pictures(model, z)).square().mean())
    assert 10 * np.log10(4 / max(error, 1e-20)) > DECIBELS[weights]
    if keep == "both":
        torch.testing.assert_close(opened.encode(images), model.encode(images), atol=0.1, rtol=0.1)
    else:
        with pytest.raises(BidmError, match=r"no encoder.*original.*keep: both") as caught:
            opened.encode(images)
        assert "\n" not in str(caught.value)
    assert sample(opened, n=1, steps=2).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("weights", DECIBELS)
@pytest.mark.parametrize("name", STAGES)
def test_the_file_says_what_it_holds(name: str, weights: str, tmp_path: Path) -> None:
    model = latent_model(name)
    packed(model, tmp_path, "decoder", weights)
    metadata, tensors = read_packed(tmp_path / "m.bidm")
    kept = {key.removeprefix("first_stage.") for key in tensors if key.startswith("first_stage.")}
    assert not any(key.startswith(("encoder", "quant_conv")) for key in kept)
    assert any(key.startswith("decoder.") for key in kept)
    assert ("quantize.embedding.weight" in kept) == ("vq" in name)
    assert ("post_quant_conv.weight" in kept) == ("without" not in name)
    quantized = [weights] if weights.startswith("int") else []
    assert metadata["requires"] == ["decoder", *quantized, "v"] and metadata["format_version"] == 4
    about = metadata["first_stage"]
    assert (about["keep"], about["weights"]) == ("decoder", weights)
    assert {f"{key}_{weights}" for key in about["errors"]} == {
        k for k in kept if k.endswith(("int8", "int6"))
    }
    assert all(0 < error < {"int8": 0.01, "int6": 0.04}[weights] for error in about["errors"].values())
    for key in kept:
        tensor = tensors[f"first_stage.{key}"]
        exact = "embedding" in key and weights.startswith("int")
        rest = torch.float32 if weights == "float32" or exact else torch.float16
        assert tensor.dtype == {"8": torch.int8, "6": torch.uint8}.get(key.rpartition("int")[2], rest), key
        assert tensor.is_floating_point() or model.first_stage is not None
    stage = model.first_stage
    assert stage is not None
    large = {k for k, v in stage.decoder.named_parameters() if v.dim() > 1 and v.numel() >= FEWEST}  # type: ignore
    assert {key.removeprefix("decoder.") for key in about["errors"]} == (large if quantized else set())


def test_all_of_it_in_floats_is_the_file_of_before(tmp_path: Path) -> None:
    """A recipe without the section, as stored ones are, and no name that earlier readers do not know."""
    model, recipe = latent_model(), recipe_of("both", "float16")
    values = recipe.to_json()
    assert "first_stage" not in values
    metadata, tensors = pack_model(model, values)
    assert "first_stage" not in metadata and metadata["requires"] == ["v"]
    state = model.first_stage.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(tensors[f"first_stage.{key}"], value.half()) for key, value in state.items())
    assert Recipe.from_json(values) == recipe
    assert Recipe.from_json({**values, "store": {"float": "float32"}}).first_stage.weights == "float32"
    default = Recipe.load("w1a1")
    assert Recipe.from_json(default.to_json()) == default


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for weights in ("int8", "int8", "int6", "int6"):
        packed(latent_model(), tmp_path, weights=weights)
        contents.append((tmp_path / "m.bidm").read_bytes())
    assert contents[0] == contents[1] != contents[2] == contents[3]


@pytest.mark.parametrize("kind", ["int8", "int6"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 3, 3), (2, 64), (4, 65), (1, 130, 1)])
def test_weights_round_to_the_nearest_of_their_group(kind: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    integers, scale = quantize(weight, kind)
    assert (tuple(integers.shape), tuple(scale.shape)) == stored_shapes(shape, kind)
    back = dequantize(integers, scale, kind, shape)
    groups = scale.float()[:, None] if kind == "int8" else scale.float().repeat_interleave(64, dim=1)
    allowed = groups.expand(shape[0], -1)[:, : weight.flatten(1).shape[1] if kind == "int6" else None]
    assert bool(((back - weight).flatten(1).abs() <= allowed * 0.55 + 1e-7).all())
    assert not back[0].any()


def test_four_values_of_six_bits_take_three_bytes() -> None:
    weight = torch.tensor([[31.0, -31.0, 1.0, -1.0, 2.0]])
    integers, scale = quantize(weight, "int6")
    assert scale.tolist() == [[1.0]]
    bits = 31 | (64 - 31) << 6 | 1 << 12 | 63 << 18
    assert integers.tolist() == [[bits & 255, bits >> 8 & 255, bits >> 16, 2, 0, 0]]


def test_scales_that_overflow_float16_stay_float32(tmp_path: Path) -> None:
    model = latent_model()
    weight = dict(model.first_stage.named_parameters())["decoder.mid.block_1.conv1.weight"]  # type: ignore
    weight.data *= 1e9
    opened = packed(model, tmp_path)
    name = "first_stage.decoder.mid.block_1.conv1.weight_scale"
    assert read_packed(tmp_path / "m.bidm")[1][name].dtype == torch.float32
    found = dict(opened.first_stage.named_parameters())["decoder.mid.block_1.conv1.weight"]  # type: ignore
    torch.testing.assert_close(found.data, weight.data, atol=float(weight.data.abs().max()) / 200, rtol=0)


def test_a_decoder_that_diverged_is_refused(tmp_path: Path) -> None:
    model = latent_model()
    dict(model.first_stage.named_parameters())["decoder.mid.block_1.conv1.weight"].data[0] = float("nan")  # type: ignore
    with pytest.raises(BidmError, match="infinities or NaN"):
        packed(model, tmp_path)


CONV = "first_stage.decoder.mid.block_1.conv1.weight"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def _filled(value: float, dtype: torch.dtype = torch.float16) -> Change:
    return lambda m, t: t.update({f"{CONV}_scale": torch.full((32,), value, dtype=dtype)})


@pytest.mark.parametrize(
    ("weights", "change", "says"),
    [
        ("int8", _filled(float("inf")), "infinities"),
        ("int8", _filled(float("nan")), "infinities"),
        ("int8", _filled(3e38, torch.float32), "infinities"),
        ("int6", lambda m, t: t[f"{CONV}_scale"].fill_(float("nan")), "infinities"),
        ("int8", lambda m, t: t.pop(f"{CONV}_scale"), "is missing"),
        ("int8", lambda m, t: t.pop(f"{CONV}_int8"), "missing.*not expected"),
        ("int8", lambda m, t: t.update({CONV: torch.zeros(32, 32, 3, 3)}), "not expected"),
        ("int8", lambda m, t: t.update({f"{CONV}_scale": torch.ones(31)}), r"is \[31\], .*\[32\]"),
        ("int8", lambda m, t: t.update({f"{CONV}_scale": torch.ones(32, dtype=torch.uint8)}), "torch.uint8"),
        ("int8", lambda m, t: t.update({f"{CONV}_int8": t[f"{CONV}_int8"][:, :31]}), "the network needs"),
        ("int8", lambda m, t: t.update({f"{CONV}_int8": t[f"{CONV}_int8"].byte()}), "torch.uint8"),
        ("int6", lambda m, t: t.update({f"{CONV}_int6": t[f"{CONV}_int6"][:, :-3]}), "the network needs"),
        ("int6", lambda m, t: t.update({f"{CONV}_scale": t[f"{CONV}_scale"][:, :1]}), "the network needs"),
        ("int8", lambda m, t: m["first_stage"].update(keep="encoder"), "makes no sense"),
        ("int8", lambda m, t: m["first_stage"].update(weights="int4"), "makes no sense"),
        ("int8", lambda m, t: m["first_stage"].update(keep=["decoder"]), "makes no sense"),
        ("int8", lambda m, t: m["first_stage"].pop("errors"), "makes no sense"),
        ("int8", lambda m, t: m["first_stage"].update(errors={"a": "b"}), "makes no sense"),
        ("int8", lambda m, t: m.update(first_stage=[1]), "makes no sense"),
        ("int8", lambda m, t: m.update(first_stage=None), "missing"),
        ("int8", lambda m, t: m["first_stage"].update(keep="both"), "missing"),
    ],
)
def test_a_file_that_makes_no_sense_is_one_line(
    weights: str, change: Change, says: str, tmp_path: Path
) -> None:
    packed(latent_model(), tmp_path, weights=weights)
    metadata, tensors = read_packed(tmp_path / "m.bidm")
    change(metadata, tensors)
    write_packed(tmp_path / "bad.bidm", metadata, tensors)
    with pytest.raises(BidmError, match=says) as caught:
        load_packed(tmp_path / "bad.bidm", backend="torch")
    assert "bad.bidm" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("inpainting", True), ("text inpainting", True), ("super-resolution", False), ("semantic", False),
        ("depth", False),
    ],
)  # fmt: skip
def test_conditions_that_need_the_encoder_keep_it(kind: str, kept: bool, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint(kind, tmp_path / "original"))
    student = copy.copy(model)
    student.unet = copy.deepcopy(model.unet)
    binarize(student.unet, Recipe.load("w1a1"), timesteps=model.schedule.timesteps)
    opened = packed(student, tmp_path)
    assert isinstance(opened.first_stage, FirstStage) and (opened.first_stage.encoder is not None) == kept
    assert opened.stage_form is not None and opened.stage_form["keep"] == ("both" if kept else "decoder")
    if kept:
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        Image.fromarray(pixels[:, :, 0]).save(tmp_path / "m.png")
        found, wanted = (
            channels_from(m, tmp_path / "a.png", tmp_path / "m.png", []) for m in (opened, model)
        )
        torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1)


def test_channels_of_an_unknown_kind_keep_the_encoder(tmp_path: Path) -> None:
    """Such as the code of an image to be edited, which the user makes with it."""
    model = latent_model()
    arguments = {**UNET, "in_channels": 8}
    model.architecture["unet"]["args"] = arguments
    model.unet = build(model.architecture["unet"])
    binarize(model.unet, Recipe.load("w1a1"), timesteps=1000)
    opened = packed(model, tmp_path)
    assert opened.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("weights", DECIBELS)
@pytest.mark.parametrize("keep", ["decoder", "both"])
def test_the_whole_file_is_counted(keep: str, weights: str, tmp_path: Path) -> None:
    model, recipe = latent_model("vq"), recipe_of(keep, weights)
    opened = packed(model, tmp_path, keep, weights)
    original = latent_model("vq")
    original.unet = build(original.architecture["unet"])
    planned, stored = cost(original, recipe), cost(opened)
    assert planned.to_json() == stored.to_json()
    sizes = file_sizes(tmp_path / "m.bidm")
    assert stored.whole_packed_bytes == sizes.total - sizes.header
    count = sum(v.numel() for m in (original.unet, original.first_stage) for v in m.state_dict().values())  # type: ignore
    assert planned.whole_float_bytes == stored.whole_float_bytes == 4 * count
    inspection = Inspection.of(opened, tmp_path / "m.bidm")
    form = f"{'decoder alone' if keep == 'decoder' else 'encoder and decoder'}, {weights}"
    assert (form in inspection.to_text()) == ((keep, weights) != ("both", "float16"))
    assert "storage with the first stage" in inspection.to_text()
    assert inspection.to_json()["cost"]["whole_ratio"] == stored.whole_ratio


def test_a_network_is_timed_without_it(tmp_path: Path) -> None:
    with paired(packed(latent_model(), tmp_path)) as pair:
        assert pair.packed.first_stage is None
        assert read_packed(pair.path)[0]["requires"] == ["v"]


@pytest.mark.parametrize("name", ["kl", "vq", "diffusers kl"])
def test_an_export_says_what_it_lacks(name: str, tmp_path: Path) -> None:
    model = latent_model(name)
    if "diffusers" in name:
        arguments = {"block_out_channels": [32], "in_channels": 4, "out_channels": 4}
        model.architecture["unet"] = {"kind": "diffusers_unet", "args": arguments}
        model.unet = build(model.architecture["unet"])
        binarize(model.unet, Recipe.load("w1a1"), timesteps=1000)
    opened = packed(model, tmp_path)
    assert "left out" in (line := first_stage_line(opened)) and "`first_stage`" in line and "\n" not in line
    export_checkpoint(opened, tmp_path / "float.ckpt")
    back = load_checkpoint(tmp_path / "float.ckpt")
    assert back.first_stage is None and back.is_latent and back.sample_shape == (4, 8, 8)
    opened = packed(model, tmp_path, "both")
    assert "int8" in first_stage_line(opened)
    export_checkpoint(opened, tmp_path / "whole.ckpt")
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(load_checkpoint(tmp_path / "whole.ckpt").decode(z), opened.decode(z))
    assert first_stage_line(packed(model, tmp_path, "both", "float16")) == ""
