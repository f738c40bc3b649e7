"""The diffusers networks compute what the networks they were converted from compute."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import DenoisingNetwork, role_of, sinusoidal_embedding
from bidm_cli.networks.registry import build

DDPM: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attention_levels": [1],
}
DIFFUSERS: dict[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "attention_levels": [1],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
STAGE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
    "z_channels": 4,
    "embed_dim": 4,
}
W86: dict[str, Any] = {
    "timesteps": 1000,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "film, resnets resample": {
        "film": True,
        "resnet_down_levels": [0],
        "resnet_up_levels": [1],
        "mid_attention_norm": False,
    },
    "heads, classes": {"attention_head_dim": 16, "num_classes": 5},
    "no attention": {"attention_levels": [], "mid_attention": False},
    "up differs": {"up_attention_levels": [0], "mid_scale": 2.0},
}


def _network(kind: str, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build({"kind": kind, "args": arguments})


def _diffusers_names(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """DDPM or first stage weights under diffusers' names; 1x1 convs of attention become linear."""
    rules = (
        (r"\bdown\.(\d+)\.(block|attn)", lambda m: f"down_blocks.{m[1]}.{m[2]}"),
        (r"\bup\.(\d+)\.(block|attn)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.{m[2]}"),
        (r"\bdown\.(\d+)\.downsample", lambda m: f"down_blocks.{m[1]}.downsamplers.0"),
        (r"\bup\.(\d+)\.upsample", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.upsamplers.0"),
        (r"\bmid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}"),
        (r"\bmid\.attn_1", lambda m: "mid_block.attentions.0"),
        (r"\.block\.", lambda m: ".resnets."),
        (r"\.attn\.", lambda m: ".attentions."),
        (r"temb_proj", lambda m: "time_emb_proj"),
        (r"nin_shortcut", lambda m: "conv_shortcut"),
        (r"norm_out", lambda m: "conv_norm_out"),
        (r"temb\.dense\.(\d)", lambda m: f"time_embedding.linear_{int(m[1]) + 1}"),
        (r"(attentions\.\d+)\.norm\.", lambda m: f"{m[1]}.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", lambda m: f"{m[1]}.to_{m[2]}."),
        (r"(attentions\.\d+)\.proj_out\.", lambda m: f"{m[1]}.to_out.0."),
    )
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value.flatten(1) if ".to_" in name and value.dim() == 4 else value
    return found


@torch.no_grad()
def test_the_same_as_the_ddpm_network() -> None:
    ddpm, ours = _network("ddpm_unet", DDPM), _network("diffusers_unet", DIFFUSERS)
    ours.load_state_dict(_diffusers_names(ddpm.state_dict(), 3), strict=True)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 871])
    torch.testing.assert_close(ours(x, t), ddpm(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vq", "kl"])
@torch.no_grad()
def test_the_same_as_the_first_stages(kind: str) -> None:
    more = {"n_embed": 9} if kind == "vq" else {}
    original = _network(f"{kind}_first_stage", {**STAGE, **more})
    ours = _network(
        f"diffusers_{kind}",
        {
            "block_out_channels": [32, 64],
            "encoder_attention_levels": [1],
            "decoder_attention_levels": [1],
            "latent_channels": 4,
            **({"embed_dim": 4} if kind == "vq" else {}),
            **more,
        },
    )
    ours.load_state_dict(_diffusers_names(original.state_dict(), 2), strict=True)
    images, z = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(ours.encode(images), original.encode(images), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    torch.testing.assert_close(ours.decode(z), original.decode(z), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def _checked(network: nn.Module, y: Tensor | None = None) -> None:
    """Runs in both directions; every layer has a role; blocks are there and come in order."""
    assert isinstance(network, DenoisingNetwork)
    seen: list[str] = []
    names = [block.name for block in network.blocks()]
    for name in names:
        module = network.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    out = network(torch.randn(2, 3, 16, 16), torch.tensor([3, 871]), None, y)
    assert out.shape == (2, 3, 16, 16)
    assert seen == names
    out.sum().backward()
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert role_of(layer) != "other", name
            assert layer.weight.grad is not None, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    network = _network("diffusers_unet", {**DIFFUSERS, **VARIANTS[variant]})
    y = torch.tensor([0, 4]) if "num_classes" in VARIANTS[variant] else None
    _checked(network, y)
    if y is not None:
        with pytest.raises(BidmError, match="labels"):
            network(torch.randn(1, 3, 16, 16), torch.tensor([3]))


def test_w86_network() -> None:
    network = _network("w86_unet", W86)
    _checked(network)
    table = network.get_parameter("time_embedding.timembedding.0.weight")
    assert table.shape == (1000, 32)
    assert not table.requires_grad


def test_the_w86_network_differs_from_ddpm_in_padding_and_eps_alone() -> None:
    """With the table's sines in DDPM's order and eps and padding alike, both compute the same."""
    w86, ddpm = _network("w86_unet", {**W86, **_ONE_LEVEL}), _network("ddpm_unet", {**DDPM, **_ONE_LEVEL})
    state = _ddpm_names(w86.state_dict())
    ddpm.load_state_dict({name: state[name] for name in ddpm.state_dict()}, strict=True)
    for module in ddpm.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5
    t = torch.tensor([3, 871])
    with torch.no_grad():
        table = sinusoidal_embedding(torch.arange(1000), 32, order="sin_cos", divisor_offset=1)
        w86.get_parameter("time_embedding.timembedding.0.weight").copy_(table)
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(w86(x, t), ddpm(x, t), rtol=1e-4, atol=1e-5)


_ONE_LEVEL = {"ch_mult": [2], "num_res_blocks": 1, "attention_levels": []}


def _ddpm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a w86 network with one level under DDPM's names."""
    rules = (
        (r"^head\.", "conv_in."),
        (r"^tail\.0\.", "norm_out."),
        (r"^tail\.2\.", "conv_out."),
        (r"^time_embedding\.timembedding\.1\.", "temb.dense.0."),
        (r"^time_embedding\.timembedding\.3\.", "temb.dense.1."),
        (r"^downblocks\.", "down.0.block."),
        (r"^upblocks\.", "up.0.block."),
        (r"^middleblocks\.0\.attn\.group_norm", "mid.attn_1.norm"),
        (r"^middleblocks\.0\.attn\.proj_([qkv])", r"mid.attn_1.\1"),
        (r"^middleblocks\.0\.attn\.proj\.", "mid.attn_1.proj_out."),
        (r"^middleblocks\.0\.", "mid.block_1."),
        (r"^middleblocks\.1\.", "mid.block_2."),
        (r"block1\.0\.", "norm1."),
        (r"block1\.2\.", "conv1."),
        (r"temb_proj\.1\.", "temb_proj."),
        (r"block2\.0\.", "norm2."),
        (r"block2\.3\.", "conv2."),
        (r"shortcut\.", "nin_shortcut."),
    )
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found
