"""Statistics saved in an .npz: the layouts that people have, and what is no covariance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bidm_cli.errors import BidmError
from bidm_cli.report.metrics.base import SetStatistics, statistics_of
from bidm_cli.report.metrics.compare import Score, compare
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from bidm_cli.report.pages.page import to_html
from bidm_cli.report.pages.render import to_text
from bidm_cli.report.pages.summary import Report

DIMS = 12
WEIGHTS = torch.randn(3 * 64, DIMS, generator=torch.Generator().manual_seed(0))


def network(name: str = "inception") -> FeatureNetwork:
    return FeatureNetwork(
        name, DIMS, "none", "6726825d", True, lambda x: x.flatten(1) @ WEIGHTS, torch.device("cpu")
    )


def images(count: int, seed: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def whole(tmp_path: Path) -> SetStatistics:
    """Statistics of a data set of 400 images."""
    np.savez(tmp_path / "whole.npz", arr_0=images(400, 0))
    return statistics_of(tmp_path / "whole.npz", network())


def scored(folder: Path, reference: Path) -> Score:
    np.savez(folder / "samples.npz", arr_0=images(100, 1, low=50))
    samples = statistics_of(folder / "samples.npz", network())
    return compare(samples, statistics_of(reference, network()), network())


def test_a_reference_batch_of_guided_diffusion(whole: SetStatistics, tmp_path: Path) -> None:
    """Fewer images than features: the root of the covariance must not be taken from them either."""
    some = images(400, 0)[:10]
    np.savez(
        tmp_path / "virtual.npz",
        arr_0=some,
        arr_1=np.arange(10),
        mu=whole.mean,
        sigma=whole.covariance,
        mu_s=np.zeros(2023, np.float32),
        sigma_s=np.zeros((3, 3), np.float32),
    )
    np.savez(tmp_path / "some.npz", arr_0=some)
    found, right, by_images = (
        scored(tmp_path, tmp_path / f"{name}.npz") for name in ("virtual", "whole", "some")
    )
    assert found.values["value"] == pytest.approx(right.values["value"], rel=1e-9)
    for name in ("precision", "recall"):
        assert found.values[name] == by_images.values[name] is not None
    report = Report([], scores=[found])
    for text in (to_text(report), to_html(report)):
        assert "mu and sigma as saved" in text and "TensorFlow" in text and "its 10 images" in text
        assert "saved (10)" in text and "precision and recall are rough" in text
    assert found.to_json()["reference"]["saved"] is True and found.to_json()["reference"]["n"] == 10
    assert not any("biased" in warning and "reference" in warning for warning in found.warnings)


class WithSpatial(FeatureNetwork):
    """As ``network()``; sFID's features are a few pixels."""

    def extract_all(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return self.extract(images), images[:, 0, :5, 0].astype(np.float32)


def test_spatial_statistics_of_a_reference_batch(whole: SetStatistics, tmp_path: Path) -> None:
    """sFID is to ``mu_s`` and ``sigma_s``, as in guided-diffusion's evaluator, not to the images."""
    spatial = WithSpatial(**{**vars(network()), "spatial_dims": 5})
    every = images(400, 0)
    of_all = every[:, 0, :5, 0].astype(np.float64)
    saved = {"mu": whole.mean, "sigma": whole.covariance, "mu_s": of_all.mean(0)}
    np.savez(tmp_path / "virtual.npz", arr_0=every[:10], **saved, sigma_s=np.cov(of_all, rowvar=False))
    np.savez(tmp_path / "alone.npz", **saved, sigma_s=np.cov(of_all, rowvar=False))
    np.savez(tmp_path / "odd.npz", arr_0=every[:10], **saved, sigma_s=np.eye(4))
    np.savez(tmp_path / "some.npz", arr_0=every[:10])
    np.savez(tmp_path / "samples.npz", arr_0=images(100, 1, low=50))
    samples = statistics_of(tmp_path / "samples.npz", spatial)

    def sfid(name: str) -> tuple[float | None, str]:
        reference = statistics_of(tmp_path / f"{name}.npz", spatial)
        return compare(samples, reference, spatial).values["sfid"], " ".join(reference.notes)

    right, _ = sfid("whole")
    assert right is not None
    for name in ("virtual", "alone"):
        value, notes = sfid(name)
        assert value == pytest.approx(right, rel=1e-9) and "mu_s and sigma_s as saved" in notes
    value, notes = sfid("odd")
    assert value == sfid("some")[0] != pytest.approx(right, rel=0.01)
    assert "mu_s and sigma_s are left out" in notes and "(4, 4)" in notes


LAYOUTS: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]] = {
    "pytorch-fid": lambda mu, sigma: {"mu": mu, "sigma": sigma},
    "float32": lambda mu, sigma: {"mu": mu.astype(np.float32), "sigma": sigma.astype(np.float32)},
    "a row": lambda mu, sigma: {"mu": mu[None], "sigma": sigma},
    "ref_mu": lambda mu, sigma: {"ref_mu": mu, "ref_sigma": sigma},
    "m and s": lambda mu, sigma: {"m": mu, "s": sigma},
    "without names": lambda mu, sigma: {"arr_0": mu, "arr_1": sigma},
    "others beside": lambda mu, sigma: {"mean": mu, "cov": sigma, "n": np.array(400), "gram": np.eye(3)},
    "sFID's beside": lambda mu, sigma: {"mu": mu, "sigma": sigma, "mu_s": mu[:5], "sigma_s": sigma[:5, :5]},
    "both kinds of names": lambda mu, sigma: {"mu": mu, "sigma": sigma, "ref_mu": 0 * mu, "ref_sigma": sigma},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".npz", ".NPZ"])
def test_layouts_of_saved_statistics(layout: str, suffix: str, whole: SetStatistics, tmp_path: Path) -> None:
    with open(tmp_path / f"saved{suffix}", "wb") as file:
        np.savez(file, **LAYOUTS[layout](whole.mean, whole.covariance))
    found = scored(tmp_path, tmp_path / f"saved{suffix}")
    right = scored(tmp_path, tmp_path / "whole.npz").values["value"]
    assert found.values["value"] == pytest.approx(right, rel=1e-5)
    assert found.values["precision"] is None and found.reference.count is None
    assert any("as saved" in note for note in found.reference.notes)


def test_saved_features(whole: SetStatistics, tmp_path: Path) -> None:
    """score_sde's cifar10_stats.npz."""
    np.savez(tmp_path / "stats.npz", pool_3=whole.features)
    found, right = (scored(tmp_path, tmp_path / name).values for name in ("stats.npz", "whole.npz"))
    assert found == pytest.approx(right) and found["recall"] is not None
    np.savez(tmp_path / "other.npz", pool_3=np.zeros((50, 7), np.float32))
    with pytest.raises(BidmError, match=r"pool_3.*\(50, 7\).*12 features"):
        statistics_of(tmp_path / "other.npz", network())


EYE = np.eye(DIMS)
WRONG = {
    "variances": ({"mu": EYE[0], "sigma": EYE[0]}, r"sigma.*shape \(12,\).*\(12, 12\)"),
    "not square": ({"mu": EYE[0], "sigma": EYE[:5]}, r"sigma.*shape \(5, 12\)"),
    "not symmetric": ({"mu": EYE[0], "sigma": EYE + np.tri(DIMS)}, "not symmetric"),
    "below 0": ({"mu": EYE[0], "sigma": -EYE}, "below 0"),
    "not finite": ({"mu": EYE[0], "sigma": np.full((DIMS, DIMS), np.inf)}, "not finite"),
    "complex": ({"mu": EYE[0], "sigma": EYE * 1j}, "complex128"),
    "a text": ({"mu": np.array("x"), "sigma": EYE}, "<U1"),
    "alone": ({"mu": EYE[0]}, r"holds mu \(12,\) alone"),
    "other features": ({"mu": np.zeros(7), "sigma": np.eye(7)}, r"shape \(7,\).*12 features"),
    "several": ({"a": EYE[0], "b": EYE[1], "c": EYE}, r"several means \(a, b\)"),
    "pickled": ({"mu": np.array([None]), "sigma": EYE}, "pickled"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_covariance_is_one_clear_error(case: str, tmp_path: Path) -> None:
    arrays, words = WRONG[case]
    np.savez(tmp_path / "saved.npz", **arrays)
    with pytest.raises(BidmError, match=words) as caught:
        statistics_of(tmp_path / "saved.npz", network())
    assert "saved.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", WRONG)
def test_beside_images_it_is_left_out_aloud(case: str, tmp_path: Path) -> None:
    """Such files were read before, by their images."""
    np.savez(tmp_path / "saved.npz", arr_0=images(30, 2), **WRONG[case][0])
    np.savez(tmp_path / "images.npz", arr_0=images(30, 2))
    found, right = (scored(tmp_path, tmp_path / f"{name}.npz") for name in ("saved", "images"))
    assert found.values == right.values and not found.reference.is_saved
    assert any("left out" in warning for warning in found.warnings)


def test_images_that_cannot_be_used_cost_precision_and_recall_alone(
    whole: SetStatistics, tmp_path: Path
) -> None:
    for unusable in (
        np.zeros((5, 8, 8, 4), np.uint8),
        np.zeros((5, 7, 8, 8), np.uint8),
        images(1, 0),
        np.zeros((5, 8, 8, 3), np.complex64),
    ):
        np.savez(tmp_path / "saved.npz", arr_0=unusable, mu=whole.mean, sigma=whole.covariance)
        found, right = (scored(tmp_path, tmp_path / f"{name}.npz") for name in ("saved", "whole"))
        assert found.values["value"] == pytest.approx(right.values["value"])
        assert found.values["precision"] is None and "saved.npz" in str(found.warnings)


def test_images_of_several_sizes_are_warned_of(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, size in enumerate([(8, 8), (8, 8), (16, 12), (24, 8)]):
        Image.fromarray(np.full((*size, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    resizing = network()
    resizing.forward = lambda x: torch.nn.functional.interpolate(x, (8, 8)).flatten(1) @ WEIGHTS
    mixed = statistics_of(folder, resizing)
    np.savez(tmp_path / "even.npz", images=images(5, 0))
    even = statistics_of(tmp_path / "even.npz", resizing)
    score = compare(mixed, even, resizing)
    (warning,) = [text for text in score.warnings if "sizes" in text]
    assert "samples" in warning and "3 sizes, 8x8 to " in warning and mixed.size is None
    assert not any("sizes" in text for text in compare(even, even, resizing).warnings)
