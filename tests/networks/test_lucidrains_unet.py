from __future__ import annotations

from typing import Any

import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import LinearAttentionProduct, role_of
from bidm_cli.networks.lucidrains_unet import ChannelNorm, LucidrainsUNet, RMSNorm
from bidm_cli.networks.registry import build
from bidm_cli.report.cost.cost import cost

ARGUMENTS: dict[str, Any] = {
    "dim": 8,
    "dim_mults": [1, 2],
    "channels": 3,
    "out_dim": 3,
    "full_attn": [False, True],
    "attn_heads": [2, 2],
    "attn_dim_head": [4, 4],
}


def _network(**change: Any) -> LucidrainsUNet:
    torch.manual_seed(0)
    network = build({"kind": "lucidrains_unet", "args": {**ARGUMENTS, **change}})
    assert isinstance(network, LucidrainsUNet)
    return network


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"strided": True},
        {"norm": "group", "mem_kv": 0, "attention_norm": "layer", "average": True},
        {"init_dim": 12, "channels": 1, "out_dim": 2},
        {"dim_mults": [2], "full_attn": [False], "attn_heads": [1], "attn_dim_head": [8]},
    ],
)
def test_shapes(change: dict[str, Any]) -> None:
    network = _network(**change)
    x = torch.randn(2, change.get("channels", 3), 8, 12)
    with torch.no_grad():
        assert network(x, torch.tensor([0, 9])).shape == (2, change.get("out_dim", 3), 8, 12)


def test_blocks_are_modules_in_the_order_of_execution() -> None:
    network, seen = _network(), list[str]()
    for block in network.blocks():
        network.get_submodule(block.name).register_forward_hook(
            lambda module, inputs, output, name=block.name: seen.append(name)
        )
    network(torch.randn(1, 3, 8, 8), torch.tensor([3]))
    assert seen == [block.name for block in network.blocks()]
    assert [b.stage for b in network.blocks()].count("decoder") == 7


def test_every_layer_has_a_role() -> None:
    layers = [m for m in _network().modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert all(role_of(layer) != "other" for layer in layers)


def test_an_attention_feature_holds_its_residual() -> None:
    network = _network()
    attention = network.downs[0][2]
    torch.nn.init.zeros_(attention.to_out[1].g)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(attention(x), x)


def test_linear_attention_is_the_reordered_product() -> None:
    q, k, v = (torch.randn(2, 3, size, 7, dtype=torch.float64) for size in (4, 4, 5))
    expected = torch.einsum("nhdl,nhdm,nhem->nhel", q, k, v)
    torch.testing.assert_close(LinearAttentionProduct()(q, k, v), expected)


def test_norms() -> None:
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(RMSNorm(6)(x), x / x.square().mean(1, keepdim=True).sqrt())
    expected = torch.nn.functional.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)
    torch.testing.assert_close(ChannelNorm(6)(x), expected)


def test_self_condition_is_zeros_where_none_is_given() -> None:
    network = _network(self_condition=True)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t, x_self=torch.zeros_like(x)))
        assert not torch.equal(network(x, t), network(x, t, x_self=torch.ones_like(x)))


def test_attention_is_counted() -> None:
    counted = cost(_network(), sample_shape=(3, 8, 8))
    products = {row.name: row.macs for row in counted.attention}
    # Linear, 8 x 8 positions and 4 learned keys: heads * d * e * ((L + 4) + L).
    assert products["downs.0.2.product"] == 2 * 4 * 4 * (68 + 64)
    # Full, 4 x 4 positions: heads * L * (L + 4) * (d + e).
    assert products["mid_attn.product"] == 2 * 16 * 20 * 8
    assert len(products) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"dim_mults": []},
        {"full_attn": [True]},
        {"attn_heads": [0, 1]},
        {"dim": 1 << 40},
        {"mem_kv": -1},
        {"norm": "group", "groups": 3},
        {"dim_mults": [1.5, 2]},
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(BidmError, match="cannot build network 'lucidrains_unet'"), torch.device("meta"):
        build({"kind": "lucidrains_unet", "args": {**ARGUMENTS, **change}})
