from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import role_of
from bidm_cli.networks.ldm_unet import LDMUNet
from bidm_cli.networks.openai_blocks import AttentionBlock, ResBlock
from bidm_cli.networks.spatial_transformer import BasicTransformerBlock

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
PLAIN: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "film and resblock_updown": {"use_scale_shift_norm": True, "resblock_updown": True},
    "no conv_resample": {"conv_resample": False},
    "classes": {"num_classes": 5},
    "transformer": {"use_spatial_transformer": True, "context_dim": 24, "transformer_depth": 2},
    "linear transformer": {
        "use_spatial_transformer": True,
        "context_dim": 24,
        "use_linear_in_transformer": True,
    },
    "blocks by level": {"num_res_blocks": [2, 1]},
    "new order": {"use_new_attention_order": True, "num_head_channels": 16},
    "attention in some blocks": {
        "num_res_blocks": 2,
        "attention_resolutions": [1, 2],
        "num_attention_blocks": [0, 1],
    },
    "attention to the context alone": {
        "use_spatial_transformer": True,
        "context_dim": 24,
        "disable_self_attentions": [False, True],
        "disable_middle_self_attn": True,
    },
}


def _network(**more: Any) -> LDMUNet:
    torch.manual_seed(0)
    return LDMUNet(**{**PLAIN, **more}).eval()


def _inputs(network: LDMUNet, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    inputs = {"x": torch.randn(2, 3, 8, 8, dtype=dtype), "t": torch.tensor([3, 700])}
    if network.spatial_transformer:
        inputs["context"] = torch.randn(2, 3, 24, dtype=dtype)
    if network.label_emb is not None:
        inputs["y"] = torch.tensor([0, 4])
    return inputs


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forward_does_not_depend_on_memory_layout(variant: str) -> None:
    network = _network(**VARIANTS[variant])
    inputs = _inputs(network)
    out = network(**inputs)
    assert out.shape == (2, 3, 8, 8)
    inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    again = network.to(memory_format=torch.channels_last)(**inputs)
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_half_precision(variant: str) -> None:
    network = _network(**VARIANTS[variant])
    inputs = _inputs(network)
    expected = network(**inputs)
    for dtype in (torch.bfloat16, torch.float16):
        low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        out = network.to(dtype)(**low)
        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()
        network.float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_are_the_outputs_of_their_submodules(variant: str) -> None:
    with torch.device("meta"):
        network = _network(**VARIANTS[variant])
        inputs = _inputs(network)
    seen: list[str] = []
    for block in network.blocks():
        network.get_submodule(block.name).register_forward_hook(
            lambda module, args, out, name=block.name: seen.append(name)
        )
    network(**inputs)
    assert seen == [block.name for block in network.blocks()]
    stages = [block.stage for block in network.blocks()]
    assert stages == sorted(stages, key=["encoder", "middle", "decoder"].index)
    assert stages.count("encoder") == stages.count("decoder")


def test_every_layer_has_a_role() -> None:
    network = _network(num_classes=5, use_spatial_transformer=True, context_dim=24)
    roles = {
        name: role_of(layer)
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding))
    }
    assert "other" not in roles.values()
    expected = {
        "time_embed.0": "time_embedding",
        "time_embed.2": "time_embedding",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "stem",
        "input_blocks.1.0.in_layers.2": "conv",
        "input_blocks.1.0.emb_layers.1": "time_projection",
        "input_blocks.1.0.out_layers.3": "conv",
        "input_blocks.2.0.op": "resample",
        "input_blocks.3.0.skip_connection": "skip",
        "input_blocks.3.1.proj_in": "transformer_in",
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q": "attention_qkv",
        "input_blocks.3.1.transformer_blocks.0.attn2.to_v": "attention_qkv",
        "input_blocks.3.1.transformer_blocks.0.attn2.to_out.0": "attention_out",
        "input_blocks.3.1.transformer_blocks.0.ff.net.0.proj": "feed_forward",
        "input_blocks.3.1.transformer_blocks.0.ff.net.2": "feed_forward",
        "input_blocks.3.1.proj_out": "transformer_out",
        "output_blocks.1.2.conv": "resample",
        "out.2": "head",
    }
    assert {name: roles[name] for name in expected} == expected
    block = AttentionBlock(32, 2)
    assert (role_of(block.qkv), role_of(block.proj_out)) == ("attention_qkv", "attention_out")


def test_attention_in_the_first_blocks_of_a_level() -> None:
    network = _network(**VARIANTS["attention in some blocks"])
    found = {name for name, layer in network.named_modules() if isinstance(layer, AttentionBlock)}
    assert found == {"input_blocks.4.1", "middle_block.1", "output_blocks.0.1"}


@torch.no_grad()
def test_transformers_that_attend_to_the_context_alone() -> None:
    """Moving one position of x then changes no other position."""
    torch.manual_seed(0)
    for alone in (False, True):
        block = BasicTransformerBlock(16, 24, heads=2, head_width=8, self_attention=not alone).eval()
        x, context = torch.randn(1, 5, 16), torch.randn(1, 3, 24)
        moved = x.clone()
        moved[:, 0] = torch.randn(1, 16)
        same = torch.isclose(block(x, context), block(moved, context)).all(dim=2)[0]
        assert same.tolist() == [False, *[alone] * 4]
        assert block.attn1.to_k.in_features == (24 if alone else 16)


def test_lists_by_level_have_one_entry_a_level() -> None:
    with pytest.raises(ValueError, match="num_attention_blocks has 1 entries, channel_mult 2"):
        _network(num_attention_blocks=[1])


def test_contexts_of_different_widths_are_refused() -> None:
    network = _network(use_spatial_transformer=True, transformer_depth=2, context_dim=[24, 16])
    with pytest.raises(BidmError, match=r"different widths, \[24, 16\]"):
        network(torch.randn(1, 3, 8, 8), torch.tensor([1]), torch.randn(1, 5, 24))


@torch.no_grad()
def test_vectors_are_added_to_the_time_embedding() -> None:
    network = _network(adm_in_channels=6).double()
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([3, 700]), torch.randn(2, 6).double()
    seen: list[Tensor] = []
    network.middle_block[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    network(x, t, y=y)
    network(x, t, y=torch.zeros_like(y))
    weights = network.state_dict()
    first = y @ weights["label_emb.0.0.weight"].T
    hidden = [F.silu(part + weights["label_emb.0.0.bias"]) for part in (first, torch.zeros_like(first))]
    wanted = (hidden[0] - hidden[1]) @ weights["label_emb.0.2.weight"].T
    torch.testing.assert_close(seen[0] - seen[1], wanted)
    with pytest.raises(BidmError, match="conditional on y"):
        network(x, t)


@torch.no_grad()
def test_attention_orders_and_scale_by_the_definition() -> None:
    torch.manual_seed(1)
    heads, channels, length = 4, 64, 9
    x = torch.randn(2, channels, 3, 3)
    for new_order in (False, True):
        block = AttentionBlock(channels, heads, new_order).eval()
        qkv = block.qkv(block.norm(x).reshape(2, channels, length))
        width = channels // heads
        results = []
        for head in range(heads):
            if new_order:
                starts = [part * channels + head * width for part in range(3)]
            else:
                starts = [(3 * head + part) * width for part in range(3)]
            q, k, v = (qkv[:, start : start + width] for start in starts)
            weights = torch.softmax((q * width**-0.25).transpose(1, 2) @ (k * width**-0.25), dim=-1)
            results.append(v @ weights.transpose(1, 2))
        expected = x + block.proj_out(torch.cat(results, dim=1)).reshape(x.shape)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_film_scales_by_the_first_half() -> None:
    torch.manual_seed(2)
    block = ResBlock(32, 32, 8, film=True).eval()
    x, embedding = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
    scale, shift = block.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
    h = block.out_layers[0](block.in_layers(x)) * (1 + scale) + shift
    torch.testing.assert_close(block(x, embedding), x + block.out_layers[1:](h))


def test_missing_conditions_are_said() -> None:
    network = _network(use_spatial_transformer=True, context_dim=24)
    with pytest.raises(BidmError, match="context"):
        network(torch.randn(1, 3, 8, 8), torch.tensor([1]))
    with pytest.raises(BidmError, match="labels"):
        _network(num_classes=3)(torch.randn(1, 3, 8, 8), torch.tensor([1]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 3},
        {"num_head_channels": 128},
        {"num_heads": 100_000, "use_spatial_transformer": True, "context_dim": 8},
        {"num_res_blocks": [1, 1, 1]},
        {"channel_mult": []},
        {"channel_mult": [0.001]},
        {"use_spatial_transformer": True, "context_dim": [8, 8], "transformer_depth": 3},
    ],
)
def test_impossible_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError), torch.device("meta"):
        _network(**wrong)


def test_equals_guided_diffusion() -> None:
    folder = SHARED / "guided_diffusion"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    arguments = json.loads((folder / "hparams.json").read_text())["unet"]
    arguments.pop("image_size")
    network = LDMUNet(**arguments).eval()
    network.load_state_dict(torch.load(folder / "ema_0.9999_000010.pt", weights_only=True), strict=True)
    ref = np.load(folder / "ref.npz")
    x, t, y = (torch.from_numpy(ref[name]) for name in ("x", "t", "y"))
    with torch.no_grad():
        out = network(x, t, None, y)
    expected = torch.from_numpy(ref["out"])
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
