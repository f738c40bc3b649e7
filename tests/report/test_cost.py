"""Counts against numbers worked out by hand, published totals, and the bytes really written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import bidm_cli
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import with_role
from bidm_cli.packed.format.container import network_bytes, read_packed
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.cost import operations
from bidm_cli.report.cost.cost import Cost, cost
from bidm_cli.report.cost.file_sizes import file_sizes
from tests.report.models import (
    TINY_DDPM,
    lsun_bedrooms,
    model_of,
    packed_of,
    student_of,
    tiny,
)

RECIPES = ["bidm", "w1a1", "w1a2", "reference", "xnor", "w1a32"]
COST_KEYS = [
    "parameters",
    "float_bytes",
    "packed_bytes",
    "storage_ratio",
    "whole_float_bytes",
    "whole_packed_bytes",
    "whole_ratio",
    "macs",
    "ops",
    "ops_ratio",
    "macs_with_attention",
    "ops_with_attention",
    "ops_ratio_with_attention",
]


@pytest.fixture(scope="module")
def bedrooms() -> Cost:
    return cost(lsun_bedrooms(), "bidm")


def test_lsun_bedrooms_has_the_published_size_and_macs(bedrooms: Cost) -> None:
    assert bedrooms.parameters == 274_056_163
    assert bedrooms.float_bytes == 4 * 274_056_163
    assert round(bedrooms.float_bytes / 2**20, 1) == 1045.4
    assert round(bedrooms.macs / 1e9, 2) == 96.02
    assert round(bedrooms.macs_with_attention / 1e9, 2) == 101.20


def test_lsun_bedrooms_macs_by_role(bedrooms: Cost) -> None:
    """The paper's split, counted from the public configuration: method.md section 5 gives these four."""
    by_role: dict[str, int] = {}
    for row in bedrooms.layers:
        by_role[row.role] = by_role.get(row.role, 0) + row.macs
    assert round(by_role["skip"] / 1e9, 2) == 3.88
    assert round((by_role["attention_qkv"] + by_role["attention_out"]) / 1e9, 2) == 7.66
    assert round((by_role["stem"] + by_role["head"]) / 1e9, 2) == 0.05
    assert round((by_role["conv"] + by_role["resample"]) / 1e9, 2) == 84.42


def test_lsun_bedrooms_meets_the_papers_savings(bedrooms: Cost) -> None:
    assert bedrooms.storage_ratio >= 29
    assert bedrooms.ops_ratio >= 52.7
    # What was counted when this was written; a change of the rules should be noticed.
    assert bedrooms.ops_ratio == pytest.approx(54.691, abs=1e-3)
    assert bedrooms.storage_ratio == pytest.approx(29.723, abs=1e-3)
    assert bedrooms.ops_ratio_with_attention == pytest.approx(14.587, abs=1e-3)


def test_every_scale_map_shortcut_and_connection_is_counted(bedrooms: Cost) -> None:
    breakdown = bedrooms.breakdown()
    for item in (
        "threshold",
        "input_scale",
        "scale_map",
        "output_scale",
        "shortcut",
        "shortcut_tile",
        "shortcut_pool",
        "connections",
    ):
        assert breakdown[item] > 0, item
    assert sum(breakdown.values()) == pytest.approx(bedrooms.ops_with_attention)
    # The last 8 of 12 decoder blocks: 3 of 448 channels and 3 of 224 at 32x32/64x64, 2 of 672 at 16/32.
    outputs = 672 * 16**2 + 672 * 32**2 + 2 * 448 * 32**2 + 448 * 64**2 + 3 * 224 * 64**2
    assert breakdown["connections"] == 2 * outputs


def test_json_has_exactly_the_documented_keys(bedrooms: Cost) -> None:
    assert list(bedrooms.to_json()) == COST_KEYS


def test_rows_add_up_to_the_totals(bedrooms: Cost) -> None:
    rows = bedrooms.layers + bedrooms.others
    assert sum(row.float_bytes for row in rows) == bedrooms.float_bytes
    assert sum(row.packed_bytes for row in rows) == bedrooms.packed_bytes
    assert sum(row.bops for row in rows) / 64 + sum(row.float_ops for row in rows) == bedrooms.ops


def test_operations_of_one_convolution_by_hand() -> None:
    """3x3, stride 2, 6 -> 4 channels, 8x8 -> 4x4, everything on."""
    geometry = LayerGeometry("conv2d", 6, 4, (3, 3), (2, 2), (1, 1, 1, 1))
    counted = operations.float_operations(geometry, BinarySpec(), 6 * 64, 4 * 16, has_bias=True)
    assert counted == {
        "threshold": 384,  # each of 6*8*8 inputs is compared once
        "input_scale": 384,  # and added once into A
        "scale_map": 144,  # 9 taps for each of 16 output pixels
        "output_scale": 128,  # * K, then * alpha + bias, for each of 4*16 outputs
        "shortcut": 64,  # + |s| P
        "shortcut_pool": 384,  # a mean of 4 pixels for each of 6*16 pooled values
        "shortcut_tile": 96,  # 6 channels averaged into 4 at 16 pixels
    }
    assert operations.bit_operations(geometry, BinarySpec(), 64) == 6 * 9 * 64


def test_bytes_of_one_odd_convolution_by_hand() -> None:
    """3 filters of 5x3x3 = 45 bits take 6 bytes each; then alpha 3, bias 3, tau 5, k 9, s 1 in float16."""
    geometry = LayerGeometry("conv2d", 5, 3, (3, 3), (1, 1), (1, 1, 1, 1))
    assert operations.stored_bytes(geometry, BinarySpec(), True, 2) == 3 * 6 + 2 * (3 + 3 + 5 + 9 + 1)
    by_conv = BinarySpec(shortcut="conv", threshold="none", activation_scale="fixed")
    assert operations.stored_bytes(geometry, by_conv, False, 4) == 3 * 6 + 4 * (3 + 9 + 1 + 15)


def test_operations_of_parts_that_are_left_out() -> None:
    geometry = LayerGeometry("linear", 8, 8)
    plain = BinarySpec(activation_scale="none", threshold="none", shortcut="none", weight_scale="none")
    assert operations.float_operations(geometry, plain, 8, 8, has_bias=False) == {"threshold": 8}
    assert operations.float_operations(geometry, plain, 8, 8, has_bias=True) == {
        "threshold": 8,
        "output_scale": 8,
    }
    weights_only = BinarySpec(activations="float", shortcut="none")
    assert operations.float_operations(geometry, weights_only, 8, 8, has_bias=True) == {
        "additions": 64,
        "output_scale": 8,
    }
    assert operations.bit_operations(geometry, weights_only, 8) == 0
    conv = LayerGeometry("conv2d", 8, 4)
    by_conv = operations.float_operations(conv, BinarySpec(shortcut="conv"), 8 * 9, 4 * 9, has_bias=True)
    assert by_conv["shortcut_conv"] == 8 * 4 * 9 and "shortcut_tile" not in by_conv


@pytest.mark.parametrize("recipe", RECIPES)
def test_predicted_bytes_are_the_bytes_on_disk(
    recipe: str, tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    predicted = cost(tiny_model, recipe)
    packed = packed_of(tiny_model, tmp_path / "m.bidm", recipe)
    with safe_open(tmp_path / "m.bidm", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("unet.")}  # noqa: SIM118
    on_disk = sum(t.numel() * t.element_size() for t in tensors.values())
    assert predicted.packed_bytes == on_disk == network_bytes(read_packed(packed.path)[1])
    assert cost(packed).to_json() == predicted.to_json()
    rows = zip(cost(packed).layers, predicted.layers, strict=True)
    assert all(a.packed_bytes == b.packed_bytes for a, b in rows)


def test_a_packed_file_is_counted_by_its_real_bytes(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """A number that does not fit float16 is stored as float32, which no prediction knows."""
    with torch.no_grad():
        tiny_model.unet.conv_out.bias.fill_(1e6)  # type: ignore[union-attr, operator]
    packed = packed_of(tiny_model, tmp_path / "m.bidm")
    assert cost(packed).packed_bytes == cost(tiny_model, "bidm").packed_bytes + 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_in_training_counts_as_its_plan(recipe: str, tiny_model: DiffusionModel) -> None:
    expected = cost(tiny_model, recipe).to_json()
    student = student_of(tiny_model, recipe)
    assert cost(student).to_json() == expected
    assert cost(student.unet, sample_shape=(1, 8, 8)).to_json() == expected


def test_a_float_model_saves_nothing(tiny_model: DiffusionModel) -> None:
    found = cost(tiny_model)
    assert found.storage_ratio == found.ops_ratio == found.ops_ratio_with_attention == 1.0
    assert found.parameters == sum(p.numel() for p in tiny_model.unet.parameters())


def test_meta_and_real_weights_count_alike_and_nothing_is_changed(tiny_model: DiffusionModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.unet.state_dict().items()}
    found = cost(tiny_model, "bidm")
    assert found.to_json() == cost(model_of("ddpm_unet", TINY_DDPM, (1, 8, 8), "meta"), "bidm").to_json()
    after = tiny_model.unet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in tiny_model.unet.modules())


class Plain(nn.Module):
    """A network that is none of ours: grouped and plain convolutions, one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = with_role(nn.Conv2d(2, 8, 3, padding=1), "stem")
        self.twice = nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.spare = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.grouped(self.twice(self.twice(self.stem(x))))


def test_any_module_can_be_counted() -> None:
    found = cost(Plain(), sample_shape=(2, 4, 4))
    macs = {row.name: row.macs for row in found.layers}
    assert macs == {
        "stem": 2 * 8 * 9 * 16,
        "twice": 2 * 8 * 8 * 16,
        "grouped": 8 * 2 * 9 * 16,
        "spare": 0,
    }
    assert found.parameters == sum(p.numel() for p in Plain().parameters())


def test_attention_products_are_counted_apart(tiny_model: DiffusionModel) -> None:
    found = cost(tiny_model)
    # Two attention blocks in the decoder level, one in the encoder, one in the middle; 16 tokens of 64.
    assert [row.macs for row in found.attention] == [2 * 16 * 16 * 64] * 4
    assert found.macs_with_attention - found.macs == 4 * 2 * 16 * 16 * 64


def test_binary_scores_are_counted_as_bits(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """16 tokens of 64 channels, one head: the scores become bits, their scaling and the values stay float."""
    before, after = cost(tiny_model, "w1a1"), cost(tiny_model, "w1a1-attention")
    products, pairs, elements = 16 * 16 * 64, 16 * 16, 2 * 16 * 64
    for row in after.attention:
        assert (row.kind, row.macs, row.bops, row.packed_bytes) == (
            "binary scores",
            2 * products,
            products,
            2,
        )
        assert row.items == {"attention products": products, "scores": pairs + 2 * elements}
    saved = 4 * (products - products / 64 - pairs - 2 * elements)
    assert before.ops_with_attention - after.ops_with_attention == pytest.approx(saved)
    assert after.ops == before.ops and after.packed_bytes == before.packed_bytes + 4 * 2
    packed = cost(packed_of(tiny_model, tmp_path / "m.bidm", "w1a1-attention"))
    assert packed.to_json() == after.to_json()
    assert packed.packed_bytes == network_bytes(read_packed(tmp_path / "m.bidm")[1])
    assert [row.to_json() for row in cost(student_of(tiny_model, "w1a1-attention")).attention] == [
        row.to_json() for row in after.attention
    ]


def test_inputs_that_do_not_fit_are_one_clear_error() -> None:
    with pytest.raises(BidmError, match="needs sample_shape"):
        cost(Plain())
    with pytest.raises(BidmError, match=r"cannot be run on inputs of shape \(1, 3, 4, 4\)"):
        cost(Plain(), sample_shape=(3, 4, 4))


def test_the_lazy_name() -> None:
    assert bidm_cli.cost is cost
    assert cost(tiny(), "bidm").binary_layers > 0


def test_file_sizes_add_up(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    packed = packed_of(tiny_model, tmp_path / "m.bidm")
    sizes = file_sizes(tmp_path / "m.bidm")
    assert (
        sizes.network == network_bytes(read_packed(packed.path)[1])
        and sizes.first_stage == sizes.conditioner == 0
    )
    assert sizes.total == (tmp_path / "m.bidm").stat().st_size
    assert sizes.header == sizes.total - sizes.network > 0
    (tmp_path / "x.bidm").write_bytes(b"\xff" * 40)
    with pytest.raises(BidmError, match="not a packed file"):
        file_sizes(tmp_path / "x.bidm")
