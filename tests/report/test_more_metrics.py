"""sFID, Inception Score and kernel distance against torch-fidelity and formulas; streaming; uncertainties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_fid.fid_score
import torch
from scipy import linalg

from bidm_cli.report.metrics import kernel_distance as kernel_distance_module
from bidm_cli.report.metrics import moments as streaming
from bidm_cli.report.metrics.base import SetStatistics, statistics_of
from bidm_cli.report.metrics.compare import compare
from bidm_cli.report.metrics.frechet import frechet_distance, with_spread
from bidm_cli.report.metrics.inception_score import SPLIT, inception_score
from bidm_cli.report.metrics.kernel_distance import SUBSET_SIZE, kernel_distance
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from bidm_cli.report.metrics.saved import save_statistics
from bidm_cli.report.pages.render import score_lines, score_table
from tests.report.test_metrics import inception, inception_file, statistics_from, write_images

__all__ = ["inception", "inception_file"]


def features(count: int, dims: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).random((count, dims)) + shift).astype(np.float32)


def test_kernel_distance_equals_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    monkeypatch.setattr(kernel_distance_module, "SUBSETS", 5)
    a, b = features(1300, 24, 0), features(1100, 24, 1, 0.1)
    tensors = torch.from_numpy(a), torch.from_numpy(b)
    expected = fidelity.kid_features_to_metric(
        *tensors, kid_subsets=5, kid_subset_size=SUBSET_SIZE, rng_seed=2020, verbose=False
    )
    assert kernel_distance(a, b).value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


def test_kernel_distance_by_its_formula() -> None:
    """Every pair by hand, in float64."""
    x, y = features(9, 3, 0).astype(np.float64), features(9, 3, 1, 0.3).astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 72
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 81
    assert kernel_distance(x, y).value == pytest.approx(within - 2 * across, rel=1e-9)


def test_error_of_the_kernel_distance_is_its_spread_over_repeated_experiments() -> None:
    found = [kernel_distance(features(80, 4, i), features(80, 4, 100 + i, 0.2)) for i in range(60)]
    spread = np.std([one.value for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("count", [300, 2 * SPLIT])
def test_inception_score_equals_torch_fidelitys(count: int) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    x, classifier = features(count, 8, 0), features(10, 8, 1) * 6
    logits = torch.from_numpy(x @ classifier.T)
    splits = max(1, count // SPLIT)
    expected = fidelity.isc_features_to_metric(logits, splits=splits, shuffle=False)["inception_score_mean"]
    assert inception_score(x, classifier).value == pytest.approx(expected, rel=1e-6)


def test_inception_score_by_its_formula_and_at_its_bounds() -> None:
    x, classifier = features(40, 8, 0).astype(np.float64), features(5, 8, 1).astype(np.float64)
    p = np.exp(x @ classifier.T)
    p /= p.sum(axis=1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())
    assert inception_score(x, classifier).value == pytest.approx(expected, rel=1e-9)
    sure = np.eye(7, dtype=np.float32).repeat(3, axis=0) * 1000
    assert inception_score(sure, np.eye(7, dtype=np.float32)).value == pytest.approx(7)
    assert inception_score(sure[:3], np.eye(7, dtype=np.float32)).value == pytest.approx(1)


def test_error_of_the_inception_score_is_its_spread_over_repeated_experiments() -> None:
    classifier = features(10, 8, 1) * 6
    found = [inception_score(features(200, 8, i), classifier) for i in range(60)]
    spread = np.std([one.value for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.35)


def test_spatial_features_are_those_of_guided_diffusions_evaluator(
    tmp_path: Path, inception: FeatureNetwork
) -> None:
    """The first 7 maps of the whole block Mixed_6d, whose first branch is TensorFlow's mixed_6/conv; channels
    last, as TensorFlow flattens them."""
    a, b = (write_images(tmp_path / name, 6, seed) for seed, name in enumerate("ab"))
    found = [statistics_of(path, inception) for path in (a, b)]
    block, kept = _mixed_6d(inception), []
    hook = block.register_forward_hook(
        lambda _, __, output: kept.append(output[:, :7].permute(0, 2, 3, 1).flatten(1))
    )
    for path in (a, b):
        statistics_of(path, inception)
    hook.remove()
    expected = [statistics_from(maps.numpy().astype(np.float64)) for maps in kept]
    assert found[0].spatial is not None and found[0].spatial.shape == (6, 2023)
    np.testing.assert_allclose(found[0].spatial, expected[0].features, rtol=1e-5, atol=1e-6)
    values = compare(*found, inception).values
    assert values["spatial_fd"] == pytest.approx(frechet_distance(*expected), rel=1e-5)
    assert values["class_score"] is not None and "fid" not in str(values) and "kid" not in str(values)


def _mixed_6d(network: FeatureNetwork) -> torch.nn.Module:
    """The block inside the closure of the network's function."""
    cells = [cell.cell_contents for cell in network.forward.__closure__ or ()]
    whole = next(cell for cell in cells if isinstance(cell, torch.nn.Module))
    return whole.blocks[2][6]


def test_published_names_are_for_published_weights_alone(tmp_path: Path) -> None:
    def network(name: str, published: bool) -> FeatureNetwork:
        return FeatureNetwork(name, 6, "", "ab" * 32, published, lambda x: x, torch.device("cpu"))

    one = statistics_from(features(12, 6, 0).astype(np.float64))
    assert "kid" in compare(one, one, network("inception", True)).values
    assert {"sfid", "inception_score"} <= set(compare(one, one, network("inception", True)).values)
    for other in (network("inception", False), network("efficientnet-lite0", False)):
        names = set(compare(one, one, other).values)
        assert not names & {"fid", "kid", "sfid", "inception_score"} and "kernel_distance" in names
    assert "spatial_fd" not in compare(one, one, network("timm:x", False)).values


def test_moments_of_a_mapped_file_equal_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "IN_MEMORY", 0)
    values = streaming.room_for(2500, 7)
    assert isinstance(values, np.memmap)
    values[:] = features(2500, 7, 0, 100.0)
    streaming.release(values)
    mean, covariance = streaming.moments(values)
    plain = np.array(values, np.float64)
    np.testing.assert_allclose(mean, plain.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(plain, rowvar=False), rtol=1e-10)
    order = np.array([2400, 3, 3, 1999])
    np.testing.assert_array_equal(streaming.chosen_rows(values, order), plain[order])


def test_saved_statistics_are_pytorch_fids(tmp_path: Path) -> None:
    one, other = (statistics_from(features(40, 5, seed).astype(np.float64)) for seed in (0, 1))
    save_statistics(tmp_path / "a.npz", one.mean, one.covariance)
    mean, covariance = pytorch_fid.fid_score.compute_statistics_of_path(
        str(tmp_path / "a.npz"), None, 50, 5, "cpu"
    )
    root = linalg.sqrtm(covariance @ other.covariance).real
    gap = mean - other.mean
    expected = gap @ gap + np.trace(covariance) + np.trace(other.covariance) - 2 * np.trace(root)
    assert frechet_distance(one, other) == pytest.approx(expected, abs=1e-6)


def test_spread_of_the_distance_over_disjoint_subsets() -> None:
    one, other = (statistics_from(features(50, 4, seed).astype(np.float64)) for seed in (0, 1))
    found = with_spread(one, other)
    assert not isinstance(found, float) and found.value == frechet_distance(one, other)
    assert one.features is not None
    parts = [statistics_from(one.features[i::5].astype(np.float64)) for i in range(5)]
    expected = [frechet_distance(part, other) for part in parts]
    assert found.center == pytest.approx(np.mean(expected))
    assert found.error == pytest.approx(np.std(expected, ddof=1))
    assert "5 disjoint subsets of 10 samples" in found.method
    few = statistics_from(features(9, 4, 0).astype(np.float64))
    assert isinstance(with_spread(few, other), float)


def test_uncertainties_are_in_table_lines_and_json() -> None:
    network = FeatureNetwork("timm:x", 4, "", "ab" * 32, False, lambda x: x, torch.device("cpu"))
    one, other = (statistics_from(features(50, 4, seed).astype(np.float64)) for seed in (0, 1))
    score = compare(one, other, network)
    assert "±" in score_table([score]).to_text()
    lines = "\n".join(score_lines([score]))
    assert "5 disjoint subsets of 10 samples" in lines and "bootstrap, 100 draws of 50 and 50" in lines
    json = score.to_json()["uncertainty"]
    assert json["value"]["mean"] > 0 and json["kernel_distance"]["standard_deviation"] > 0


def test_statistics_without_images_have_no_values_of_images() -> None:
    network = FeatureNetwork("inception", 4, "", "ab" * 32, False, lambda x: x, torch.device("cpu"))
    one = statistics_from(features(50, 4, 0).astype(np.float64))
    saved = SetStatistics(Path("x"), None, "", "file", None, one.mean, one.covariance)
    values = compare(one, saved, network).values
    assert values["kernel_distance"] is None and values["spatial_fd"] is None and values["value"] is not None
