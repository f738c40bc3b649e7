"""Benchmarks: alternation, medians, what is compared, memory, and saying so when packed is slower."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from bidm_cli.diffusion.augmentation import NoiseAugmentation
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench import step, timing
from bidm_cli.report.bench.limit import layer_products, products_per_second
from bidm_cli.report.bench.memory import peak_memory
from bidm_cli.report.bench.models import paired, with_random_weights
from bidm_cli.report.bench.result import BenchResult, LayerTiming, Timing
from bidm_cli.report.bench.tables import kind_table, layer_speed_table, slower_notes, speed_table
from bidm_cli.report.bench.timing import BenchOptions, alternate, bench
from tests.packed.format.test_first_stage import latent_model
from tests.report.models import lsun_bedrooms, model_of, packed_of, tiny


def test_sides_alternate_and_the_better_format_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {
        "slow": iter([1.0, 4.0, 9.0, 4.0]),
        "quick": iter([1.0, 3.0, 3.0, 3.0]),
        "packed": iter([1.0, 2, 1, 9]),
    }

    def timed(call: object, repeats: int, device: object) -> float:
        order.append(str(call))
        return next(seconds[str(call)])

    monkeypatch.setattr(timing, "timed", timed)
    monkeypatch.setattr(step, "timed", timed)
    found = alternate({"slow": "slow", "quick": "quick"}, "packed", 3)  # type: ignore[dict-item, arg-type]
    assert order[3:] == ["slow", "quick", "packed"] * 3
    assert found.float_format == "quick" and found.float_rounds == (3.0, 3.0, 3.0)
    assert found.packed_seconds == 2.0 and found.ratio == 1.5
    assert found.spread == (pytest.approx(1 / 3), 3.0)


def test_short_work_is_repeated_and_timed_per_call() -> None:
    calls = []
    found = alternate({"contiguous": lambda: calls.append(1)}, lambda: None, 2)
    assert len(calls) > 100, "5 ms hold many empty calls"
    assert found.float_seconds < 1e-3


def test_bench_of_a_float_model_and_a_recipe(tiny_model: DiffusionModel) -> None:
    with paired(tiny_model, recipe=Recipe.load("bidm"), backend="torch") as pair:
        result = bench(pair, BenchOptions(steps=2, rounds=2, memory=False))
    names = [name for layer in result.layers for name in layer.names]
    binary = [r.name for r in pair.packed.layers if r.spec is not None]
    assert sorted(names) == sorted(binary), "every packed layer is timed once"
    assert len(result.layers) < len(binary), "layers of one shape are measured once"
    kinds = {layer.kind for layer in result.layers}
    assert {"3x3", "3x3 stride 2", "1x1", "linear"} <= kinds
    json = result.to_json()
    for entry in (json["step"], json["sampling"], *json["layers"]):
        assert entry["float_seconds"] > 0 and entry["packed_seconds"] > 0
        assert entry["ratio"] == pytest.approx(entry["float_seconds"] / entry["packed_seconds"])
        assert entry["ratio_spread"][0] <= entry["ratio_spread"][1]
    assert json["sampling"]["steps"] == 2 and json["memory"] is None
    assert json["machine"]["backend"] == "torch" and json["machine"]["float_weights"] == "the checkpoint"
    inputs = {layer.names[0]: layer.input for layer in result.layers}
    assert inputs["down.0.block.0.conv1"] == (1, 32, 8, 8)


def test_the_pair_is_the_same_network(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    packed = packed_of(tiny_model, tmp_path / "m.bidm")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with paired(packed, tiny_model, backend="torch") as pair, torch.no_grad():
        assert pair.origin == "the teacher"
        assert torch.equal(pair.packed.denoise(x, t), packed.denoise(x, t))
        assert torch.equal(pair.float_model.denoise(x, t), tiny_model.denoise(x, t))
    with paired(packed, backend="torch") as pair:
        assert pair.origin == "random weights"
        assert pair.float_model.unet.state_dict().keys() == tiny_model.unet.state_dict().keys()


def test_the_checkpoint_is_left_as_it_was(tiny_model: DiffusionModel) -> None:
    before = copy.deepcopy(tiny_model.unet.state_dict())
    with paired(tiny_model, recipe=Recipe.load("bidm"), backend="torch") as pair:
        bench(pair, BenchOptions(steps=0, rounds=1, memory=False))
    after = tiny_model.unet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_model.unet.modules())


def test_a_bare_architecture_gets_random_weights() -> None:
    bare = lsun_bedrooms()
    assert bare.device.type == "meta"
    small = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "attention_resolutions": [2]}
    model = model_of("ldm_unet", {**small, "in_channels": 3, "out_channels": 3}, (3, 8, 8), "meta")
    with paired(model, recipe=Recipe.load("bidm"), backend="torch") as pair:
        assert pair.origin == "random weights" and pair.float_model.device.type == "cpu"
        result = bench(pair, BenchOptions(batch_size=2, steps=0, rounds=1, layers=False, memory=False))
    assert result.sampling is None and result.layers == [] and result.batch_size == 2


def test_random_weights_are_the_described_network() -> None:
    model = tiny()
    model.augmentation = NoiseAugmentation(model.schedule, levels=350)
    made = with_random_weights(model.metadata())
    assert made.metadata() == model.metadata() and made.augmentation.levels == 350


def test_what_cannot_be_compared(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(BidmError, match="give `recipe`"), paired(tiny_model):
        pass
    packed = packed_of(tiny_model, tmp_path / "m.bidm")
    with pytest.raises(BidmError, match="leave out `recipe`"), paired(packed, recipe=Recipe.load("bidm")):
        pass
    other = model_of(
        "ddpm_unet",
        {
            "in_channels": 3,
            "out_channels": 3,
            "ch": 32,
            "ch_mult": [1],
            "num_res_blocks": 1,
            "attention_levels": [],
        },
        (3, 8, 8),
    )
    with pytest.raises(BidmError, match=r"denoises \[3, 8, 8\]"), paired(packed, other):
        pass


def test_peak_memory_of_a_float_network_holds_its_weights(tmp_path: Path) -> None:
    args = {"in_channels": 1, "out_channels": 1, "ch": 128, "ch_mult": [1, 2], "num_res_blocks": 1}
    model = model_of("ddpm_unet", {**args, "attention_levels": []}, (1, 8, 8))
    weights = 4 * sum(p.numel() for p in model.unet.parameters())
    shared = {"batch": 1, "device": "cpu"}
    found = peak_memory({"metadata": model.metadata(), **shared})["bytes"]
    assert weights < found < 4 * weights
    packed = packed_of(model, tmp_path / "m.bidm")
    smaller = peak_memory({"packed": str(packed.path), "backend": "torch", **shared})["bytes"]
    assert 0 < smaller < found


def test_a_failing_memory_job_is_one_clear_error() -> None:
    with pytest.raises(BidmError, match="measures peak memory failed"):
        peak_memory({"packed": "/nowhere.bidm", "backend": "torch", "batch": 1, "device": "cpu"})


def result_of(ratio: float, packed_bytes: int) -> BenchResult:
    one = Timing((ratio, ratio), (1.0, 1.0), "contiguous")
    layers = [LayerTiming(("a", "b"), "conv", "3x3", (8, 8, 3, 3), (1, 8, 4, 4), one)]
    machine = {"device": "cpu", "threads": 2, "backend": "numba", "float_weights": "x", "torch": "2"}
    memory = {"float_bytes": 100, "packed_bytes": packed_bytes, "kernel_bytes": 0}
    return BenchResult(one, one, 5, layers, memory, 1, machine)


def test_slower_is_said_plainly() -> None:
    assert slower_notes(result_of(2.0, 50)) == []
    notes = slower_notes(result_of(0.5, 200))
    assert sum("SLOWER" in note for note in notes) == 2 and any("MORE memory" in note for note in notes)
    assert "0.50x" in notes[0]


def test_tables_of_a_result() -> None:
    result = result_of(2.0, 50)
    assert [row[3] for row in speed_table(result).rows] == ["2.00x", "2.00x", "2.00x"]
    assert kind_table(result).rows[-1] == ("all binary layers", "", "2", "4 s", "2 s", "2.00x")
    assert layer_speed_table(result).rows[0][0] == "a and 1 more"
    assert "numba" in speed_table(result).to_text()
    assert "share of limit" not in kind_table(result).columns


def test_layers_are_measured_by_the_limit_of_the_kernels() -> None:
    one = Timing((2.0,), (1.0,), "contiguous")
    layers = [
        LayerTiming(("a", "b"), "conv", "3x3", (8, 8, 3, 3), (1, 8, 4, 4), one, products, limit=100.0)
        for products in (50, 20)
    ]
    machine = {"device": "cpu", "threads": 2, "backend": "numba", "float_weights": "x", "torch": "2"}
    result = BenchResult(one, None, 0, layers, None, 1, machine)
    assert [row[-1] for row in layer_speed_table(result).rows] == ["50.0 %", "20.0 %"]
    assert kind_table(result).rows[-1][-1] == "35.0 %" and "Limit:" in kind_table(result).to_text()
    assert result.to_json()["layers"][0]["share_of_limit"] == 0.5


def test_products_of_layers_and_of_the_inner_loop() -> None:
    conv = LayerGeometry("conv2d", 6, 4, (3, 3), (2, 2), (1, 1, 1, 1))
    assert layer_products(conv, (2, 6, 8, 8), planes=2) == 2 * (2 * 4 * 4) * (6 * 9) * 4
    assert layer_products(LayerGeometry("conv1d", 6, 4, (1, 3)), (2, 6, 8), 1) == 2 * 6 * 18 * 4
    assert layer_products(LayerGeometry("linear", 6, 4), (2, 5, 6), 1) == 10 * 24
    assert products_per_second("torch") == 0.0 and products_per_second("numba") > 1e8


@pytest.mark.parametrize("given", ["packed", "packed and original", "recipe", "recipe, no weights"])
def test_decoding_and_a_whole_picture(given: str, tmp_path: Path) -> None:
    recipe, model = Recipe.load("w1a1"), latent_model()
    write_packed(tmp_path / "m.bidm", *pack_model(model, recipe.to_json()))
    original = copy.copy(model)
    original.unet = build(model.architecture["unet"])
    packed = load_packed(tmp_path / "m.bidm")
    if given == "recipe, no weights":
        original.to("meta")
    arguments = {"packed": (packed,), "packed and original": (packed, original)}
    with paired(*arguments.get(given, (original, None, recipe))) as pair:
        result = bench(pair, BenchOptions(steps=0, rounds=3, memory=False, layers=False))
    picture, decoding = result.picture, result.decoding
    assert decoding is not None and picture is not None and result.picture_steps == recipe.sampler.steps
    for side in ("float_rounds", "packed_rounds"):
        rounds = zip(getattr(result.step, side), getattr(decoding, side), strict=True)
        assert getattr(picture, side) == tuple(recipe.sampler.steps * one + other for one, other in rounds)
    text = speed_table(result).to_text()
    assert "decoding one picture" in text and f"a whole picture: {recipe.sampler.steps} steps" in text
    assert result.to_json()["picture"]["steps"] == recipe.sampler.steps


def test_pixel_models_decode_nothing(tiny_model: DiffusionModel) -> None:
    with paired(tiny_model, recipe=Recipe.load("w1a1"), backend="torch") as pair:
        result = bench(pair, BenchOptions(steps=0, rounds=1, memory=False, layers=False))
    assert result.decoding is None and result.picture is None and result.to_json()["picture"] is None
