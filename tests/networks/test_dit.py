from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bidm_cli.binary.surgery import binarize, plan
from bidm_cli.distill.spd import SpacePatchedDistillation
from bidm_cli.errors import BidmError
from bidm_cli.networks.dit import DiT, image_of
from bidm_cli.networks.layers import role_of
from bidm_cli.networks.registry import build
from bidm_cli.recipe import Recipe
from bidm_cli.report.cost.cost import cost

ARGUMENTS: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "hidden_size": 32,
    "depth": 5,
    "num_heads": 4,
    "label_rows": 11,
}
PUBLISHED = {
    "XL/2": (1152, 28, 16, 2, 675_129_632),
    "B/2": (768, 12, 12, 2, 130_512_416),
    "S/8": (384, 12, 6, 8, 33_148_160),
}


def _network(**change: Any) -> DiT:
    torch.manual_seed(0)
    network = build({"kind": "dit", "args": {**ARGUMENTS, **change}})
    assert isinstance(network, DiT)
    return network


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name: str) -> None:
    width, depth, heads, patch, expected = PUBLISHED[name]
    with torch.device("meta"):
        network = _network(
            input_size=32,
            patch_size=patch,
            hidden_size=width,
            depth=depth,
            num_heads=heads,
            label_rows=1001,
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert not list(network.buffers())


def test_blocks_are_feature_points_under_their_own_names() -> None:
    network = _network()
    blocks = network.blocks()
    assert [b.name for b in blocks] == [f"blocks.{i}" for i in range(5)]
    assert [b.stage for b in blocks] == ["encoder", "encoder", "middle", "decoder", "decoder"]
    assert network.get_submodule("blocks.3.attn.qkv").weight.shape == (96, 32)
    assert "blocks.0.attn.qkv.weight" in network.state_dict()
    copied = copy.deepcopy(network)
    assert copied.blocks is not network.blocks and len(copied.blocks()) == 5


def test_patches_go_back_where_they_came_from() -> None:
    """A token's outputs are (row, column, channel) within its patch, channels fastest."""
    network = _network()
    patches = torch.arange(16 * 2 * 2 * 8.0).reshape(1, 16, 32)
    image = image_of(patches, network.patch_size, network.side)
    assert image.shape == (1, 8, 8, 8)
    for token, row, column, channel in ((0, 0, 0, 0), (5, 1, 0, 3), (15, 1, 1, 7), (3, 0, 1, 2)):
        y, x = token // 4 * 2 + row, token % 4 * 2 + column
        assert image[0, channel, y, x] == patches[0, token, row * 16 + column * 8 + channel]


def test_without_a_label_it_is_the_null_label() -> None:
    network = _network()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t, None, torch.tensor([10, 10])))
        assert not torch.equal(network(x, t), network(x, t, None, torch.tensor([1, 1])))


def test_roles() -> None:
    network = _network()
    roles = {
        name: role_of(m)
        for name, m in network.named_modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert roles["x_embedder.proj"] == "stem" and roles["final_layer.linear"] == "head"
    assert roles["blocks.0.adaLN_modulation.1"] == "time_projection"
    assert roles["blocks.0.mlp.fc1"] == "feed_forward" and roles["t_embedder.mlp.2"] == "time_embedding"
    assert roles["blocks.0.attn.qkv"] == "attention_qkv" and roles["blocks.0.attn.proj"] == "attention_out"
    assert "other" not in roles.values()


def test_a_recipe_binarizes_and_connects_it() -> None:
    network, recipe = _network(), Recipe.load("bidm")
    assert sum(item.spec is not None for item in plan(network, recipe)) == 5 * 5 + 1
    binarize(network, recipe, 1000)
    assert network.connections.block_names == ["blocks.3", "blocks.4"]
    memory: dict[str, torch.Tensor] = {}
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    with torch.no_grad(), network.connections.carrying(t, memory):
        network(x, t)
    assert memory["blocks.4"].shape == (1, 16, 32)


def test_cost_counts_tokens() -> None:
    counted = cost(_network(), "bidm", sample_shape=(4, 8, 8))
    rows = {row.name: row for row in counted.layers}
    assert rows["blocks.0.attn.qkv"].macs == 16 * 32 * 96
    assert rows["blocks.0.attn.qkv"].bops == 16 * 32 * 96
    assert {row.macs for row in counted.attention} == {2 * 16 * 16 * 32}
    connections = next(row for row in counted.others if row.kind == "connections")
    assert connections.items == {"connections": 2 * 2 * 16 * 32}


def test_spd_takes_the_tokens_as_a_map() -> None:
    spd = SpacePatchedDistillation(patches=2)
    tokens = torch.randn(2, 16, 32)
    as_image = tokens.transpose(1, 2).reshape(2, 32, 4, 4)
    other = torch.randn(2, 16, 32)
    other_image = other.transpose(1, 2).reshape(2, 32, 4, 4)
    assert torch.equal(spd([tokens], [other]), spd([as_image], [other_image]))
    assert spd([tokens], [tokens]) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": 3},
        {"num_heads": 5},
        {"depth": 10**9},
        {"hidden_size": -32},
        {"label_rows": 0},
        {"input_size": float("nan")},
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(BidmError, match="cannot build network 'dit'"), torch.device("meta"):
        build({"kind": "dit", "args": {**ARGUMENTS, **change}})
