"""Layer surgery: rules, names, blocks, and networks bidm has never seen."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.surgery import binarize, plan, select_blocks
from bidm_cli.errors import BidmError
from bidm_cli.networks.ddpm_unet import DDPMUNet
from bidm_cli.networks.registry import build
from bidm_cli.recipe import Recipe


def network() -> DDPMUNet:
    torch.manual_seed(0)
    return DDPMUNet(
        in_channels=3, out_channels=3, ch=32, ch_mult=[1, 2], num_res_blocks=1, attention_levels=[1]
    ).eval()


def recipe(rules: str, rest: str = "tbs: null") -> Recipe:
    return Recipe.parse(f"name: x\nlayers:\n{rules}\n{rest}\n", "my.yaml")


def test_first_matching_rule_wins():
    rules = (
        "  - {name: up.0.block.0.conv1, keep: float}\n"
        "  - {role: conv, binarize: {shortcut: none}}\n"
        "  - {role: '*', keep: float}"
    )
    by_name = {item.name: item for item in plan(network(), recipe(rules))}
    assert by_name["up.0.block.0.conv1"].spec is None and by_name["up.0.block.0.conv1"].rule == 0
    assert by_name["up.0.block.0.conv2"].spec.shortcut == "none"
    assert by_name["conv_in"].rule == 2


def test_layers_no_rule_names_stay_float():
    planned = plan(network(), recipe("  - {role: skip, binarize: {}}"))
    assert {p.rule for p in planned if p.role != "skip"} == {None}
    assert all(p.spec is None for p in planned if p.role != "skip")


def test_swapped_layers_are_the_planned_ones_and_the_rest_is_untouched():
    original, changed = network(), network()
    planned = binarize(changed, Recipe.load("bidm"), timesteps=1000)
    for item in planned:
        layer = changed.get_submodule(item.name)
        assert isinstance(layer, BinaryLayer) == (item.spec is not None)
        assert torch.equal(layer.weight, original.get_submodule(item.name).weight)
    floats = {p.role for p in planned if p.spec is None}
    assert floats == {"stem", "head", "time_embedding"}
    assert changed.connections.block_names == [
        "up.1.attn.0", "up.1.attn.1", "up.1.upsample", "up.0.block.0", "up.0.block.1"
    ]  # fmt: skip


def test_a_name_that_decides_nothing_is_an_error_with_its_line():
    rules = "  - {role: stem, keep: float}\n  - {name: 'output_blocks.*', keep: float}"
    with pytest.raises(BidmError, match=r"my\.yaml, line 4: .*output_blocks"):
        plan(network(), recipe(rules))


def test_a_role_that_this_network_lacks_is_fine():
    rules = "  - {role: feed_forward, keep: float}\n  - {role: '*', binarize: {}}"
    assert plan(network(), recipe(rules))


def test_any_module_can_be_binarized():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    binarize(model, recipe("  - {role: '*', binarize: {}}"), timesteps=10)
    assert isinstance(model[0], BinaryLayer) and model[0].geometry.kind == "conv2d"
    assert isinstance(model[3], BinaryLayer) and model[3].geometry.kind == "linear"
    assert model(torch.randn(1, 3, 3, 3)).shape == (1, 2)


def test_a_selected_layer_that_cannot_be_binary_stops_with_rule_and_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(BidmError, match=r"my\.yaml, line 3: 0: groups"):
        binarize(model, recipe("  - {role: '*', binarize: {}}"), timesteps=10)


def test_a_recipe_that_makes_nothing_binary_stops():
    with pytest.raises(BidmError, match="no layer of this network becomes binary"):
        binarize(network(), recipe("  - {role: '*', keep: float}"), timesteps=10)


def test_selecting_blocks():
    net = network()
    names = [b.name for b in net.blocks()]
    assert select_blocks(net, ["blocks"], "here") == names
    assert select_blocks(net, ["decoder[-2:]"], "here") == names[-2:]
    assert select_blocks(net, ["up.0.*", "middle"], "here") == ["mid.block_2", *names[-2:]]
    with pytest.raises(BidmError, match=r"here: 'output_blocks\.3' selects no block"):
        select_blocks(net, ["output_blocks.3"], "here")


DIT = {
    "kind": "dit",
    "args": {
        "input_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 8, "hidden_size": 32, "depth": 1,
        "num_heads": 2, "label_rows": 11,
    },
}  # fmt: skip


def test_a_stage_that_a_network_lacks_is_said_and_all_layers_become_binary_all_the_same():
    net = build(DIT)
    with pytest.warns(UserWarning, match=r"'decoder\[-8:\]' selects nothing: this network names no decoder"):
        planned = binarize(net, Recipe.load("bidm"), timesteps=10)
    assert getattr(net, "connections", None) is None
    kept = {item.role for item in planned if item.spec is None}
    assert kept <= {"stem", "head", "time_embedding"}
    deeper = build({**DIT, "args": {**DIT["args"], "depth": 2}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        binarize(deeper, Recipe.load("bidm"), timesteps=10)
    assert deeper.connections.block_names == ["blocks.1"]


def test_any_module_without_blocks_takes_the_default_recipe():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.warns(UserWarning, match="names no decoder blocks"):
        binarize(net, Recipe.load("bidm"), timesteps=10)
    assert all(isinstance(layer, BinaryLayer) for layer in net)


def test_a_slice_outside_a_stage_that_is_there_is_a_mistake():
    with pytest.raises(BidmError, match=r"'decoder\[50:\]' selects no block"):
        select_blocks(network(), ["decoder[50:]"], "here")


def test_binary_scores_of_a_network_without_attention_are_said():
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.warns(UserWarning, match="there are no scores to make binary"):
        plan(net, Recipe.load("w1a1-attention"))


def test_a_binary_network_trains_every_parameter_it_has():
    net = network()
    binarize(net, Recipe.load("bidm"), timesteps=1000)
    x, t, memory = torch.randn(2, 3, 8, 8), torch.tensor([500, 10]), {}
    for _ in range(2):
        with net.connections.carrying(t, memory):
            y = net(x + torch.randn_like(x), t)
    y.square().sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == []


def test_a_deep_copy_is_independent():
    net = network()
    binarize(net, Recipe.load("bidm"), timesteps=1000)
    other = copy.deepcopy(net)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    assert torch.equal(net(x, t), other(x, t))
    assert other.connections is not net.connections
