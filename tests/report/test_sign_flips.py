"""Whole networks: numba against torch, with connections, and how often rounding flips a sign."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe
from bidm_cli.report.sign_flips import count_sign_flips
from tests.packed.conftest import small_student


@pytest.fixture
def both(tmp_path: Path) -> Callable[[str], list[PackedModel]]:
    def make(recipe: str) -> list[PackedModel]:
        metadata, tensors = pack_model(small_student(recipe), Recipe.load(recipe).to_json())
        write_packed(tmp_path / "m.bidm", metadata, tensors)
        return [load_packed(tmp_path / "m.bidm", backend=name) for name in ("torch", "numba")]

    return make


@pytest.mark.parametrize("recipe", ["bidm", "w1a2", "reference", "xnor", "w1a32"])
def test_numba_agrees_with_torch_on_a_whole_network(
    recipe: str, both: Callable[[str], list[PackedModel]]
) -> None:
    reference, packed = both(recipe)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    flips = count_sign_flips(reference, packed, x, torch.tensor([999, 600, 30, 0]))
    assert flips.rate < 1e-4
    assert flips.output_error < (1e-2 if flips.flipped else 1e-5)
    if recipe == "w1a32":
        assert flips.signs == 0
    else:
        assert flips.signs > 10_000 and sum(s for _, s in flips.by_layer.values()) == flips.signs


def test_connections_carry_their_memory_alike(both: Callable[[str], list[PackedModel]]) -> None:
    reference, packed = both("bidm")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    memories: list[dict[str, torch.Tensor]] = [{}, {}]
    for step in (700, 680, 660):
        t = torch.full((2,), step)
        expected, found = (
            m.denoise(x, t, carried=v) for m, v in zip((reference, packed), memories, strict=True)
        )
        assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
    assert memories[0].keys() == memories[1].keys() != set()
    without = packed.denoise(x, torch.full((2,), 660))
    assert not torch.allclose(without, found, atol=1e-3)


def test_flips_are_counted_where_they_happen(both: Callable[[str], list[PackedModel]]) -> None:
    """A threshold moved in one of two models must show up, first in that layer."""
    one, numba = both("bidm")
    other = load_packed(numba.path, backend="torch")
    layer = other.unet.get_submodule("down.0.block.0.conv1")
    layer.threshold += 0.1
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    flips = count_sign_flips(one, other, x, torch.tensor([5, 500]))
    flipped, signs = flips.by_layer["down.0.block.0.conv1"]
    assert 0.05 * signs < flipped < 0.5 * signs
    assert 0 < flips.rate < 0.5


def test_a_model_gives_the_same_numbers_twice_and_for_every_thread_count(
    both: Callable[[str], list[PackedModel]],
) -> None:
    packed = both("bidm")[1]
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    expected = packed.denoise(x, t)
    assert torch.equal(packed.denoise(x, t), expected)
    # One layer at a time: torch's own layers may round by their thread count.
    layer = packed.unet.get_submodule("up.0.block.0.conv1")
    x = torch.randn(2, layer.geometry.in_channels, 8, 8)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_warming_up_compiles_what_a_step_needs(both: Callable[[str], list[PackedModel]]) -> None:
    from bidm_cli.packed.cpu.runtime import kernels

    reference, packed = both("bidm")
    reference.warm_up()
    packed.warm_up()
    before = len(kernels.LOADED)
    packed.denoise(torch.randn(1, 1, 8, 8), torch.tensor([5]))
    assert len(kernels.LOADED) == before >= 7
