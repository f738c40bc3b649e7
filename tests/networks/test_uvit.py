from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.binary.surgery import plan
from bidm_cli.distill.spd import as_map
from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import role_of
from bidm_cli.networks.registry import build
from bidm_cli.networks.uvit import UViT
from bidm_cli.recipe import Recipe

ARGUMENTS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 3,
    "embed_dim": 24,
    "half_depth": 2,
    "num_heads": 4,
}


def _network(**change: Any) -> UViT:
    torch.manual_seed(0)
    network = build({"kind": "uvit", "args": {**ARGUMENTS, **change}})
    assert isinstance(network, UViT)
    return network


def test_parameter_count_of_cifar() -> None:
    with torch.device("meta"):
        network = _network(img_size=32, embed_dim=512, half_depth=6, num_heads=8)
    assert sum(parameter.numel() for parameter in network.parameters()) == 44_255_328
    assert not list(network.buffers())


def _block(w: dict[str, Tensor], name: str, x: Tensor, skip: Tensor | None = None) -> Tensor:
    if skip is not None:
        x = F.linear(torch.cat([x, skip], -1), w[f"{name}.skip_linear.weight"], w[f"{name}.skip_linear.bias"])
    h = F.layer_norm(x, (24,), w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"])
    q, k, v = F.linear(h, w[f"{name}.attn.qkv.weight"]).chunk(3, dim=-1)
    heads = []
    for i in range(4):
        part = slice(6 * i, 6 * i + 6)
        scores = (q[..., part] @ k[..., part].transpose(1, 2)) / 6**0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    x = x + F.linear(torch.cat(heads, -1), w[f"{name}.attn.proj.weight"], w[f"{name}.attn.proj.bias"])
    h = F.layer_norm(x, (24,), w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"])
    h = F.gelu(F.linear(h, w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc1.bias"]))
    return x + F.linear(h, w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"])


def test_contexts_are_tokens_between_time_and_patches() -> None:
    network = _network(context_dim=7, context_tokens=3)
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([4, 9]), torch.randn(2, 3, 7)
    seen: list[Tensor] = []
    network.in_blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(x, t, context)
    assert network.context_embed is not None
    made = network.context_embed(context)
    torch.testing.assert_close(seen[0][:, 1:4], made + network.pos_embed[:, 1:4])
    torch.testing.assert_close(seen[0][:, 4:], network.patch_embed(x) + network.pos_embed[:, 4:])


def test_the_network_written_out() -> None:
    network = _network(label_rows=5)
    w = {name: tensor.double() for name, tensor in network.state_dict().items()}
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 700]), torch.tensor([1, 4])
    rates = 10000 ** (-torch.arange(12) / 12.0).double()
    angles = (t + 1)[:, None] * rates
    tokens = F.conv2d(x.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=2)
    front = [w["label_emb.weight"][y], torch.cat([angles.cos(), angles.sin()], 1)]
    h = torch.cat([torch.stack(front, 1), tokens.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    a = _block(w, "in_blocks.0", h)
    b = _block(w, "in_blocks.1", a)
    h = _block(w, "out_blocks.1", _block(w, "out_blocks.0", _block(w, "mid_block", b), b), a)
    h = F.linear(F.layer_norm(h, (24,), w["norm.weight"], w["norm.bias"]), w["decoder_pred.weight"])
    h = (h + w["decoder_pred.bias"])[:, 2:].reshape(2, 4, 4, 2, 2, 3)
    image = torch.stack([h[:, i // 2, :, i % 2].flatten(1, 2) for i in range(8)], 1).movedim(3, 1)
    expected = F.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, None, y).double(), expected, rtol=1e-4, atol=1e-5)


def test_time_scale_and_options() -> None:
    plain, scaled = _network(), _network(time_scale=0.5)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(plain(x, torch.tensor([9])), scaled(x, torch.tensor([19])))
        other = _network(mlp_time_embed=True, conv=False, skip=False, qkv_bias=True, mlp_width=40)
        assert other(x, torch.tensor([9])).shape == x.shape


def test_blocks_and_roles() -> None:
    network = _network()
    assert [b.name for b in network.blocks()] == [
        "in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"
    ]  # fmt: skip
    assert all(network.get_submodule(b.name) is not None for b in network.blocks())
    layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert all(role_of(layer) != "other" for layer in layers)
    assert sum(item.spec is not None for item in plan(network, Recipe.load("w1a1"))) == 5 * 4 + 2


@pytest.mark.parametrize(
    ("length", "shape"), [(16, (4, 4)), (17, (4, 4)), (18, (4, 4)), (19, (19, 1)), (5, (5, 1))]
)
def test_tokens_in_front_are_no_part_of_the_map(length: int, shape: tuple[int, int]) -> None:
    tokens = torch.randn(2, length, 6)
    found = as_map(tokens)
    assert found.shape == (2, 6, *shape)
    assert torch.equal(found.flatten(2)[:, :, -1], tokens[:, -1])


@pytest.mark.parametrize(
    "change", [{"patch_size": 3}, {"num_heads": 5}, {"half_depth": 10**9}, {"embed_dim": 0}]
)
def test_arguments_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(BidmError, match="cannot build network 'uvit'"), torch.device("meta"):
        build({"kind": "uvit", "args": {**ARGUMENTS, **change}})
