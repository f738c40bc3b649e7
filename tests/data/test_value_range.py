"""Ranges of float arrays: taken, converted aloud, or refused; latents of an implausible spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bidm_cli.data import value_range
from bidm_cli.data.value_range import conversion, statistics_of_array
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from tests.distill.conftest import make_teacher


@pytest.fixture
def pixels() -> DiffusionModel:
    return make_teacher()


@pytest.fixture
def latents() -> DiffusionModel:
    model = make_teacher()
    model.sample_shape, model.scale_factor = (4, 8, 8), 0.18215
    return model


def spread(lowest: float, highest: float, shape: tuple[int, ...] = (8, 1, 8, 8)) -> np.ndarray:
    values = np.random.default_rng(0).uniform(lowest, highest, shape)
    values.flat[0], values.flat[1] = lowest, highest
    return values.astype(np.float32)


def converted(model: DiffusionModel, array: np.ndarray, as_is: bool = False, white: float | None = None):
    return conversion(statistics_of_array(array, Path("x")), model, "x", as_is, white)


@pytest.mark.parametrize(
    "lowest, highest, factor, words",
    [
        (-1, 1, 1, "taken as it is for [-1, 1]"),
        (-1.04, 1.06, 1, "taken as it is"),  # resampled
        (-0.9, 0.2, 1, "taken as it is"),
        (0, 1, 2, "taken as 0 to 1 and scaled"),
        (0.1, 0.9, 2, "taken as 0 to 1"),
        (-0.03, 1.04, 2, "taken as 0 to 1"),  # resampled
        (0, 255, 2 / 255, "taken as 0 to 255"),
        (3, 250, 2 / 255, "taken as 0 to 255"),
    ],
)
def test_ranges_of_pixels(pixels, lowest, highest, factor, words) -> None:
    found = converted(pixels, spread(lowest, highest))
    assert found.factor == pytest.approx(factor)
    assert words in found.text
    for value in (lowest, highest):
        assert -1.15 <= value * found.factor + found.offset <= 1.15


@pytest.mark.parametrize(
    "lowest, highest", [(-2.1, 2.6), (0, 16), (0, 65535), (-128, 127), (-5, 0.5), (1.5, 3)]
)
def test_other_ranges_are_refused_unless_taken_as_they_are(pixels, lowest, highest) -> None:
    array = spread(lowest, highest)
    with pytest.raises(BidmError, match=rf"ranges from {lowest:.4g} to .*`data_range`=as-is"):
        converted(pixels, array)
    assert converted(pixels, array, as_is=True).factor == 1


def test_max_value_says_what_white_is(pixels) -> None:
    assert converted(pixels, spread(0, 16), white=16).factor == pytest.approx(2 / 16)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(pixels, latents, bad) -> None:
    array = spread(-1, 1)
    array[3, 0, 2, 1] = bad
    for model in (pixels, latents):
        with pytest.raises(BidmError, match="not finite"):
            converted(model, array, as_is=True)


def test_latents_of_an_implausible_spread_are_said(latents) -> None:
    normal = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
    assert not converted(latents, normal).notes and not converted(latents, normal * 0.8).notes
    (note,) = converted(latents, normal / 0.18215).notes
    assert "5.5" in note and "scale factor 0.18215" in note
    (note,) = converted(latents, normal * 0.18215).notes
    assert "implausible" in note and "seem" not in note
    latents.scale_factor, latents.sample_shape = 1.0, (4, 8, 8)
    assert "Stable Diffusion" in converted(latents, normal / 0.18215).notes[0]


def test_statistics_are_one_pass_over_pieces_and_kept(tmp_path, monkeypatch) -> None:
    array = np.random.default_rng(0).standard_normal((50, 2, 3, 4)).astype(np.float32)
    whole = statistics_of_array(array, tmp_path / "x.npy")
    assert whole.mean == pytest.approx(array.mean(), abs=1e-6)
    assert whole.deviation == pytest.approx(array.std(), rel=1e-6)
    monkeypatch.setattr(value_range, "_PIECE_BYTES", 1000)
    pieces = statistics_of_array(array, tmp_path / "x.npy")
    assert pieces.digest == whole.digest and pieces.deviation == pytest.approx(whole.deviation)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(value_range, "CACHED_BYTES", 1)
    np.save(tmp_path / "x.npy", array)
    first = statistics_of_array(array, tmp_path / "x.npy")
    monkeypatch.setattr(value_range, "_measured", None)
    assert statistics_of_array(array, tmp_path / "x.npy") == first
