"""Tiles by timing: never another result, remembered, and no trouble from a bad cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bidm_cli.networks.fusion import Fused, Prologue
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.cpu.codegen.isa import (
    CANDIDATES,
    MOST_PAIRED,
    TILES,
    Tile,
    instruction_set,
    tiles_for,
)
from bidm_cli.packed.cpu.ops import autotune as tuning
from bidm_cli.packed.cpu.ops.autotune import Tuner, fastest, shape_class
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import layer_of, norm_of, random

GEOMETRY = LayerGeometry("conv2d", 64, 96, (3, 3), (1, 1), (1, 1, 1, 1))
SIZE = (1, 8, 8)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[list[Tile]]:
    """Timing that always likes the last candidate; what it was asked."""
    asked: list[list[Tile]] = []

    def last(geometry: LayerGeometry, size: tuple[int, int, int], tiles: list[Tile], planes: int) -> Tile:
        asked.append(tiles)
        return tiles[-1]

    monkeypatch.setattr(tuning, "fastest", last)
    return asked


def test_candidates_have_the_tables_lanes() -> None:
    """Other lanes could change how shortcuts are summed."""
    for name, tiles in CANDIDATES.items():
        assert {tile.lanes for tile in tiles} == {tile.lanes for tile in TILES[name]}


@pytest.mark.parametrize("filters", [96, 33, 64])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_all_candidates_give_the_same_bits(filters: int, planes: int) -> None:
    layer = layer_of(nn.Conv2d(64, filters, 3, padding=1), BinarySpec(planes=planes))
    x, residual = random((2, 64, 7, 5), 1), random((2, filters, 7, 5), 2)
    arguments = (x, Fused(Prologue(norm_of(8, 64), True), 1, random((2, filters), 3), residual))
    tiles = (*TILES[instruction_set()], *CANDIDATES[instruction_set()])
    results = []
    for tile in tiles:
        layer._tensors = None
        results.append(NumbaBackend(tile).run(layer.tensors, *arguments))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_choice_is_made_once_and_remembered(chosen: list[list[Tile]], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tiles.json"
    tile = Tuner(path).choose(GEOMETRY, SIZE)
    assert tile == CANDIDATES[instruction_set()][-1]
    assert Tuner(path).choose(GEOMETRY, SIZE) == tile and len(chosen) == 1
    assert json.loads(path.read_text()) == {shape_class(GEOMETRY, SIZE): str(tile)}
    Tuner(path).choose(GEOMETRY, (4, 8, 8))
    Tuner(path).choose(GEOMETRY, SIZE, planes=2)
    assert len(chosen) == 3 and len(json.loads(path.read_text())) == 3
    assert set(chosen[2]) == set(tiles_for(GEOMETRY))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"a": 1}', "\x00\xff", "[" * 100_000, '{"%s": "direct 9x9x9"}']
)
def test_a_corrupt_cache_is_ignored(text: str, chosen: list[list[Tile]], tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text.replace("%s", shape_class(GEOMETRY, SIZE)), encoding="latin-1")
    assert Tuner(path).choose(GEOMETRY, SIZE) == CANDIDATES[instruction_set()][-1]
    assert len(chosen) == 1 and shape_class(GEOMETRY, SIZE) in json.loads(path.read_text())


def test_a_cache_that_cannot_be_written_is_no_error(chosen: list[list[Tile]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tuner = Tuner(tmp_path / "file" / "tiles.json")
    tuner.choose(GEOMETRY, SIZE)
    tuner.choose(GEOMETRY, SIZE)
    assert len(chosen) == 1


def test_time_used_up_leaves_the_table(chosen: list[list[Tile]]) -> None:
    assert Tuner(allowance=0.0).choose(GEOMETRY, SIZE) == tiles_for(GEOMETRY)[0]
    assert not chosen


def test_windows_too_long_for_16_bits_are_not_counted_in_pairs() -> None:
    for words in (MOST_PAIRED, MOST_PAIRED + 1):
        tiles = tiles_for(LayerGeometry("conv2d", 32 * words, 8))
        assert any(tile.pairs for tile in tiles) == (
            words == MOST_PAIRED and TILES[instruction_set()][0].pairs
        )
        assert not tiles[-1].pairs


def test_timing_ends_and_prefers_the_first() -> None:
    tiles = [TILES[instruction_set()][0]] * 2
    assert fastest(GEOMETRY, SIZE, tiles, limit=0.01) is tiles[0]
    assert fastest(GEOMETRY, SIZE, tiles, limit=0.0) is tiles[0]


def test_the_switch_turns_it_off(
    chosen: list[list[Tile]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("BIDM_TUNE", "0")
    assert tuning.tuned_tile(GEOMETRY, SIZE) == tiles_for(GEOMETRY)[0] and not chosen
    monkeypatch.setenv("BIDM_TUNE", "1")
    assert tuning.tuned_tile(GEOMETRY, SIZE) == CANDIDATES[instruction_set()][-1]
    assert tuning.cache_path().is_file()


def test_cache_files_differ_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tuning.cache_path()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert tuning.cache_path() != one
