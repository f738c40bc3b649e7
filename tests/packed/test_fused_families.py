"""Fused blocks of every family: the same results as without each fusion, on odd sizes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks import ddpm_unet, lucidrains_unet, openai_blocks, score_unet, w86_unet
from bidm_cli.networks.diffusers import blocks as diffusers_blocks
from bidm_cli.networks.fusion import NOTHING, Features, Fused, joined, upsampled
from bidm_cli.networks.registry import build
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.layers import PackedLayer, RunsOnBackend, packed_module
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.sign_flips import count_sign_flips
from tests.helpers import close, layer_of, on, random
from tests.packed.conftest import randomize, recipe_of

GroupNorm = nn.GroupNorm
WIDTHS = {"wider": (64, 96), "narrower": (96, 64), "same": (64, 64), "odd": (40, 24)}


def _style(film: bool) -> diffusers_blocks.Style:
    return diffusers_blocks.Style(groups=8, eps=1e-5, embedding=32, film=film)


def _diffusers(c: int, o: int, film: bool = False, **more: Any) -> nn.Module:
    return diffusers_blocks.ResnetBlock2D(c, o, _style(film), **more)


def _score(c: int, o: int, resample: Literal["up", "down"], fir: bool) -> nn.Module:
    more: dict[str, Any] = {"kind": "biggan", "groups": 8, "rescale": True}
    return score_unet.ResnetBlock(c, o, 32, resample=resample, fir=fir, **more)


def _eight_groups(groups: int, channels: int, **more: Any) -> nn.GroupNorm:
    """Families fix 32 groups; 8 divide the odd widths, too."""
    return GroupNorm(8, channels, **more)


BLOCKS = {
    "ddpm": lambda c, o: ddpm_unet.ResnetBlock(c, o, 32),
    "ddpm, 3x3 shortcut": lambda c, o: ddpm_unet.ResnetBlock(c, o, 32, conv_shortcut=True),
    "openai": lambda c, o: openai_blocks.ResBlock(c, o, 32),
    "openai, film": lambda c, o: openai_blocks.ResBlock(c, o, 32, film=True),
    "openai, up": lambda c, o: openai_blocks.ResBlock(c, o, 32, resample="up"),
    "diffusers": _diffusers,
    "diffusers, film": lambda c, o: _diffusers(c, o, True),
    "diffusers, scaled": lambda c, o: _diffusers(c, o, scale=2.0),
    "diffusers, up": lambda c, o: _diffusers(c, o, resample="up"),
    "diffusers, down": lambda c, o: _diffusers(c, o, True, resample="down"),
    "w86763777": lambda c, o: w86_unet.ResBlock(c, o, 32, attention=False),
    "score": lambda c, o: score_unet.ResnetBlock(c, o, 32, kind="ddpm", groups=8),
    "score, up, scaled": lambda c, o: _score(c, o, "up", False),
    "score, down": lambda c, o: _score(c, o, "down", False),
    "score, filtered up": lambda c, o: _score(c, o, "up", True),
    "score, filtered down": lambda c, o: _score(c, o, "down", True),
    "lucidrains": lambda c, o: lucidrains_unet.LucidrainsResnetBlock(c, o, 32, "group", 8),
    "lucidrains, rms": lambda c, o: lucidrains_unet.LucidrainsResnetBlock(c, o, 32, "rms", 8),
}


def _pack(network: nn.Module) -> None:
    """Convolutions and projections as packed layers with random thresholds and scales."""
    for name, module in list(network.named_modules()):
        packed = packed_module(module)
        if packed is not None:
            packed.load_state_dict(module.state_dict())
        elif isinstance(module, nn.Conv2d | nn.Linear):
            packed = layer_of(module, BinarySpec())
        if packed is not None:
            network.set_submodule(name, packed)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_fused_block_computes_what_the_plain_one_does(
    name: str, widths: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    c, o = WIDTHS[widths]
    with monkeypatch.context() as patch:
        patch.setattr(nn, "GroupNorm", _eight_groups)
        block = BLOCKS[name](c, o).eval().requires_grad_(False)
    _pack(block)
    on(block, TorchBackend())
    size = (4, 6) if "down" in name else (3, 5)
    parts, embedding = (random((2, c - 7, *size), 1), random((2, 7, *size), 2)), random((2, 32), 3)
    x = torch.cat(parts, dim=1)
    with monkeypatch.context() as patch:
        patch.setattr(RunsOnBackend, "fuses", lambda module, prologue: False)
        expected = block(x, embedding)
    assert torch.equal(block(x, embedding), expected)
    on(block, NumbaBackend())
    found = block(x, embedding)
    close(found, expected, 1e-5)
    assert torch.equal(block(parts, embedding), found)


FAMILIES: dict[str, dict[str, Any]] = {
    "ddpm": {"kind": "ddpm_unet", "args": {"ch": 32, "attention_levels": [1]}},
    "ldm": {"kind": "ldm_unet", "args": {"model_channels": 32, "attention_resolutions": [2]}},
    "guided": {
        "kind": "ldm_unet",
        "args": {
            "model_channels": 32,
            "attention_resolutions": [2],
            "resblock_updown": True,
            "use_scale_shift_norm": True,
        },
    },
    "diffusers": {
        "kind": "diffusers_unet",
        "args": {"block_out_channels": [32, 64], "attention_levels": [1], "layers_per_block": 1},
    },
    "score-sde": {
        "kind": "score_unet",
        "args": {
            "in_channels": 3,
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_levels": [1],
            "kind": "biggan",
            "skip_rescale": True,
            "fir": True,
            "input_pyramid": True,
        },
    },
    "score-sde ddpm": {
        "kind": "score_unet",
        "args": {
            "in_channels": 3,
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_levels": [],
            "kind": "ddpm",
            "norm_groups": 32,
        },
    },
    "w86763777": {"kind": "w86_unet", "args": {"timesteps": 1000, "ch": 32, "attention_levels": [1]}},
    "lucidrains": {
        "kind": "lucidrains_unet",
        "args": {
            "dim": 32,
            "dim_mults": [1, 2],
            "channels": 3,
            "out_dim": 3,
            "full_attn": [False, True],
            "attn_heads": [2, 2],
            "attn_dim_head": [16, 16],
        },
    },
}
COMMON = {"ddpm_unet": "ch_mult", "ldm_unet": "channel_mult", "w86_unet": "ch_mult"}


def _packed(name: str, path: Path, recipe: Recipe) -> list[PackedModel]:
    """The family's network, small, on torch and on numba."""
    torch.manual_seed(0)
    kind, arguments = FAMILIES[name]["kind"], dict(FAMILIES[name]["args"])
    if kind in COMMON:
        arguments |= {"in_channels": 3, "out_channels": 3, "num_res_blocks": 1, COMMON[kind]: [1, 2]}
    architecture = {"kind": kind, "args": arguments}
    unet = build(architecture)
    binarize(unet, recipe, timesteps=1000)
    randomize(unet)
    whole = {"unet": architecture, "first_stage": None, "conditioner": None}
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    model = DiffusionModel("ddpm", unet.eval(), (3, 8, 12), schedule, SamplingConvention(), whole)
    write_packed(path / "m.bidm", *pack_model(model, recipe.to_json()))
    return [load_packed(path / "m.bidm", backend=backend) for backend in ("torch", "numba")]


@pytest.mark.parametrize("recipe", ["bidm", "w1a2", "mixed planes"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_agrees_with_torch_and_with_itself_on_whole_inputs(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, packed = _packed(name, tmp_path, recipe_of(recipe))
    # Of inputs 1 to 4, one that brings no value within rounding of a threshold in any of these networks.
    x, t = random((3, 3, 8, 12), 4), torch.tensor([900, 500, 3])
    flips = count_sign_flips(reference, packed, x, t)
    assert flips.rate < 1e-4 and flips.signs > 10_000
    assert flips.output_error < (1e-2 if flips.flipped else 1e-5)
    found, forward, virtual = packed.denoise(x, t), PackedLayer.forward, []

    def whole(layer: PackedLayer, x: Features, fused: Fused = NOTHING) -> Any:
        virtual.append((not isinstance(x, torch.Tensor), fused.upsample))
        return forward(layer, upsampled(joined(x), fused.upsample), fused._replace(upsample=1))

    monkeypatch.setattr(PackedLayer, "forward", whole)
    assert torch.equal(packed.denoise(x, t), found)
    parts, factors = zip(*virtual, strict=True)
    assert any(parts) and (name == "score-sde") != (2 in factors)  # a filter does not repeat pixels


def test_a_block_with_a_float_layer_keeps_fusion_in_the_others() -> None:
    block = ddpm_unet.ResnetBlock(64, 96, 32).eval().requires_grad_(False)
    block.conv2 = layer_of(block.conv2, BinarySpec())
    block.nin_shortcut = layer_of(block.nin_shortcut, BinarySpec())
    calls = []
    for layer in (block.conv2, block.nin_shortcut):
        layer.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    parts, embedding = (random((2, 24, 3, 5), 1), random((2, 40, 3, 5), 2)), random((2, 32), 3)
    found = block(parts, embedding)
    (x, *_), (_, fused) = calls
    assert isinstance(x, torch.Tensor) and fused.prologue.silu and fused.residual is not None
    on(block, TorchBackend())
    close(found, block(torch.cat(parts, dim=1), embedding), 1e-5)
