"""Refinement net: it starts as the head alone, learns, is counted, packed and run as float layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import bidm_cli
from bidm_cli.binary.refinement import Refinement
from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.export import export_checkpoint
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.spec import Refine
from tests.distill.conftest import make_teacher

PLAIN = """
name: refined
layers:
  - {role: [stem, head, time_embedding], keep: float}
  - {role: "*", binarize: {activation_scale: none, shortcut: none}}
store: {float: float32}
"""
REFINED = PLAIN + "refine: {channels: 3, width: 5}\n"
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([7, 900])


def student_of(recipe: str) -> DiffusionModel:
    student = make_teacher()
    binarize(student.unet, Recipe.parse(recipe, "recipe.yaml"), 1000)
    return student


def trained(student: DiffusionModel) -> DiffusionModel:
    """With values in the layers that start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (*student.unet.refinement.parameters(), *student.unet.conv_out.parameters()):
            part.add_(0.05 * torch.randn(part.shape, generator=generator))
    return student


@torch.no_grad()
def test_at_the_start_it_changes_nothing() -> None:
    plain, refined = student_of(PLAIN), student_of(REFINED)
    assert torch.allclose(refined.denoise(X, T), plain.denoise(X, T), atol=1e-6)
    assert refined.unet.conv_out.out_channels == 1 + 3


def test_it_is_the_formula_and_a_copy_uses_its_own_weights() -> None:
    student = trained(student_of(REFINED))
    net: Refinement = student.unet.refinement
    seen = {}
    student.unet.conv_out.register_forward_pre_hook(lambda m, inputs: seen.update(h=inputs[0]))
    student.unet.get_submodule(net.time).register_forward_hook(lambda m, i, out: seen.update(e=out))
    y = student.denoise(X, T)
    o = nn.functional.conv2d(seen["h"], student.unet.conv_out.weight, student.unet.conv_out.bias, padding=1)
    film = net.film(nn.functional.silu(seen["e"]))
    u = net.first(torch.cat([X, o], 1)) * (1 + film[:, :5, None, None]) + film[:, 5:, None, None]
    expected = o[:, :1] + net.last(nn.functional.silu(net.second(nn.functional.silu(u))))
    assert torch.allclose(y, expected, atol=1e-6)
    twin = copy.deepcopy(student.unet)
    nn.init.zeros_(twin.refinement.last.weight)
    nn.init.zeros_(twin.refinement.last.bias)
    assert torch.equal(student.denoise(X, T), y)
    assert not torch.allclose(twin(X, T), y)


def test_every_part_of_it_gets_a_gradient_once_it_has_begun() -> None:
    student = trained(student_of(REFINED))
    student.denoise(X, T).square().mean().backward()
    assert all(part.grad.abs().max() > 0 for part in student.unet.refinement.parameters())
    assert student.unet.conv_out.weight.grad[1:].abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_it_is_packed_by_name_and_runs_the_same(tmp_path: Path, backend: str) -> None:
    student, recipe = trained(student_of(REFINED)), Recipe.parse(REFINED)
    write_packed(tmp_path / "x.bidm", *pack_model(student, recipe.to_json()))
    assert read_packed(tmp_path / "x.bidm")[0]["requires"] == ["refine"]
    packed, calls = load_packed(tmp_path / "x.bidm", backend=backend), []
    packed.unet.refinement.register_forward_hook(
        lambda module, inputs, output: calls.append((inputs, output))
    )
    with torch.no_grad():
        y, expected = packed.denoise(X, T), student.denoise(X, T)
        (((x, o, embedding), refined),) = calls
        again = student.unet.refinement(x, o, embedding)
    assert torch.equal(x, X) and torch.equal(refined, y) and torch.allclose(again, y, atol=1e-6)
    assert backend == "numba" or torch.equal(y, expected)
    assert bidm_cli.cost(packed).packed_bytes == bidm_cli.cost(make_teacher(), recipe).packed_bytes


def test_its_cost_is_counted_on_the_binary_side_alone() -> None:
    teacher = make_teacher()
    plain, refined = (bidm_cli.cost(teacher, Recipe.parse(text)) for text in (PLAIN, REFINED))
    assert (refined.macs, refined.float_bytes) == (plain.macs, plain.float_bytes)
    pixels, head = 64, teacher.unet.conv_out.in_channels
    embedding = teacher.unet.get_submodule(Refinement.for_network(teacher.unet, Refine()).time).out_features
    convolutions = (head * 3 + (1 + 1 + 3) * 5 + 5 * 5 + 5 * 1) * 9
    weights = convolutions + 10 * embedding + 3 + 5 + 5 + 1 + 10
    assert refined.ops - plain.ops == pixels * convolutions + 10 * embedding
    assert refined.packed_bytes - plain.packed_bytes == 4 * weights


def test_other_heads_refuse_it_in_one_line() -> None:
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "hidden_size": 32}
    network = build({"kind": "dit", "args": sizes | {"depth": 1, "num_heads": 2, "label_rows": 4}})
    with pytest.raises(BidmError, match=r"recipe.yaml, line \d+: .*no convolutional head") as error:
        binarize(network, Recipe.parse(REFINED, "recipe.yaml"), 1000)
    assert "\n" not in str(error.value)


def test_export_gives_the_original_head(tmp_path: Path) -> None:
    student = trained(student_of(REFINED))
    write_packed(tmp_path / "x.bidm", *pack_model(student, Recipe.parse(REFINED).to_json()))
    export_checkpoint(load_packed(tmp_path / "x.bidm"), tmp_path / "y.pth")
    again = bidm_cli.load_checkpoint(tmp_path / "y.pth")
    assert torch.equal(again.unet.conv_out.weight, student.unet.conv_out.weight[:1])


def test_a_wrong_value_names_its_line() -> None:
    with pytest.raises(BidmError, match=r"line 7: refine.width is 0"):
        Recipe.parse(REFINED.replace("width: 5", "width: 0"), "recipe.yaml")
