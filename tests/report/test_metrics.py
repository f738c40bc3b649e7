"""Frechet distance against pytorch-fid itself, closed forms, and what a score must be quoted with.

The Inception weights here are generated in the layout of pytorch-fid's file: good for comparing two
implementations, meaningless as FID, and named accordingly.
"""

from __future__ import annotations

import hashlib
import socket
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import timm
import torch
from PIL import Image
from scipy import linalg
from torch import nn

from bidm_cli.errors import BidmError
from bidm_cli.report.metrics.base import (
    METRICS,
    SetStatistics,
    register_metric,
    statistics_of,
)
from bidm_cli.report.metrics.compare import compare
from bidm_cli.report.metrics.features import MissingWeights, load_features
from bidm_cli.report.metrics.frechet import frechet_distance
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from bidm_cli.report.metrics.networks.inception import INCEPTION_FILE
from bidm_cli.report.metrics.precision_recall import precision_recall
from bidm_cli.report.pages.page import to_html
from bidm_cli.report.pages.render import to_text
from bidm_cli.report.pages.summary import Report

TIMM = "timm:test_vit"


def write_images(folder: Path, count: int, seed: int, size: int = 24, gray: bool = False) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    for i, pixels in enumerate(low):
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        (image.convert("L") if gray else image).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated weights in the exact layout of pytorch-fid's file."""
    path = tmp_path_factory.mktemp("weights") / "generated.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *a, **k: None)
        network = pytorch_fid.inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # keeps the images' differences alive to the end
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> FeatureNetwork:
    return load_features("inception", inception_file)


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "vit.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture
def vit(timm_file: Path) -> FeatureNetwork:
    return load_features(TIMM, timm_file)


def fid_by_pytorch_fid(monkeypatch: pytest.MonkeyPatch, *statistics: np.ndarray) -> float:
    """pytorch-fid's own function; scipy 1.18 will drop the ``disp`` that it passes."""
    sqrtm = linalg.sqrtm
    monkeypatch.setattr(pytorch_fid.fid_score.linalg, "sqrtm", lambda a, disp=True: (sqrtm(a), 0.0))
    return float(pytorch_fid.fid_score.calculate_frechet_distance(*statistics))


def gaussian(seed: int, dims: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((count, dims)) @ rng.standard_normal((dims, dims)) + rng.standard_normal(
        dims
    )
    return samples.mean(0), np.cov(samples, rowvar=False)


def statistics_from(features: np.ndarray) -> SetStatistics:
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    return SetStatistics(
        Path("x"), len(features), "", "file", None, mean, covariance, features.astype(np.float32)
    )


def saved(mean: np.ndarray, covariance: np.ndarray) -> SetStatistics:
    """Statistics without features, as if read from a file."""
    return SetStatistics(Path("x"), None, "", "file", None, mean, covariance)


def distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    return frechet_distance(saved(mean1, covariance1), saved(mean2, covariance2))


def test_distance_equals_pytorch_fids(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = *gaussian(0, 24, 200), *gaussian(1, 24, 200)
    expected = fid_by_pytorch_fid(monkeypatch, *statistics)
    assert distance(*statistics) == pytest.approx(expected, rel=1e-9)


def test_distance_of_singular_covariances() -> None:
    """Fewer samples than features: compared with the same sets in the subspace that they span."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((60, 8)))
    small = *gaussian(0, 8, 100), *gaussian(1, 8, 100)
    lifted = [basis @ m if m.ndim == 1 else basis @ m @ basis.T for m in small]
    assert distance(*lifted) == pytest.approx(distance(*small), rel=1e-6)
    zero = np.zeros((60, 60))
    assert distance(lifted[0], zero, lifted[0], zero) == 0


def test_distance_in_closed_form() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    m1, m2, s1, s2 = (np.random.default_rng(i).random(10) for i in range(4))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert distance(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(expected)
    mean, covariance = gaussian(3, 50, 20)
    assert distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-6)


def test_distance_of_small_and_large_sets_agrees_with_that_of_their_statistics(vit: FeatureNetwork) -> None:
    """Fewer images than features on one side, more on the other."""
    rng = np.random.default_rng(0)
    sets = []
    for count in (10, 200):
        features = (rng.standard_normal((count, 64)) * rng.random(64)).astype(np.float32)
        mean, covariance = (
            features.mean(0, dtype=np.float64),
            np.cov(features.astype(np.float64), rowvar=False),
        )
        sets.append(SetStatistics(Path("x"), count, "", "file", None, mean, covariance, features))
    a, b = sets
    for one, other in ((a, b), (b, a), (a, a)):
        expected = distance(one.mean, one.covariance, other.mean, other.covariance)
        assert compare(one, other, vit).values["value"] == pytest.approx(expected, abs=1e-6)


def test_distance_refuses_what_cannot_be_compared() -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    with pytest.raises(BidmError, match="3 and 4 features"):
        distance(mean, covariance, np.zeros(4), np.eye(4))
    with pytest.raises(BidmError, match="not finite"):
        distance(mean, covariance, mean * np.nan, covariance)


def test_statistics_and_score_equal_pytorch_fids(
    tmp_path: Path, inception: FeatureNetwork, inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write_images(tmp_path / name, 4, seed) for seed, name in enumerate("ab")]
    state = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: state)
    original = pytorch_fid.inception.InceptionV3()
    expected = []
    for folder in folders:
        files = sorted(folder.glob("*.png"))
        acts = pytorch_fid.fid_score.get_activations(files, original, batch_size=3, num_workers=0)
        expected.append(statistics_from(acts))
    found = [statistics_of(folder, inception, batch_size=4) for folder in folders]
    np.testing.assert_allclose(found[0].mean, expected[0].mean, rtol=1e-5, atol=1e-6)
    largest = expected[1].covariance.max()
    np.testing.assert_allclose(found[1].covariance, expected[1].covariance, atol=1e-4 * largest)
    score = compare(found[0], found[1], inception)
    assert score.values["value"] == pytest.approx(frechet_distance(*expected), rel=1e-3)
    assert score.values["value"] > 0.1


def test_generated_weights_are_never_called_fid(
    tmp_path: Path, inception: FeatureNetwork, inception_file: Path
) -> None:
    one = statistics_of(write_images(tmp_path / "a", 2, 0), inception)
    score = compare(one, one, inception)
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert score.metric == f"FD (Inception with other weights, {digest[:8]})"
    json = score.to_json()
    assert json["weights_sha256"] == digest and json["published_weights"] is False and "fid" not in json
    assert any("not the weights that define FID" in warning for warning in score.warnings)


def test_published_weights_are_known_by_their_hash() -> None:
    network = FeatureNetwork("inception", 1, "", "6726825d00", True, lambda x: x, torch.device("cpu"))
    assert network.metric == "FID"


def test_timm_features_are_never_called_fid(tmp_path: Path, vit: FeatureNetwork, timm_file: Path) -> None:
    a = statistics_of(write_images(tmp_path / "a", 12, 0), vit)
    b = statistics_of(write_images(tmp_path / "b", 12, 1), vit)
    score = compare(a, b, vit)
    assert score.metric == f"FD ({TIMM})" and "fid" not in score.to_json() and score.values["value"] > 0
    assert score.network.weights_sha256 == hashlib.sha256(timm_file.read_bytes()).hexdigest()
    assert a.features is not None and a.features.shape == (12, vit.dims)
    assert "160x160" in vit.resize


def test_timm_features_are_the_models_own(tmp_path: Path, vit: FeatureNetwork, timm_file: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0).eval()
    state = torch.load(timm_file, weights_only=True)
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    pixels = np.full((1, 160, 160, 3), 64, np.uint8)
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((torch.full((1, 3, 160, 160), 64 / 255) - mean) / std)
    np.testing.assert_allclose(vit.extract(pixels), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_everything_a_score_is_quoted_with(tmp_path: Path, vit: FeatureNetwork) -> None:
    folder = write_images(tmp_path / "a", 3, 0, size=24)
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 8, 8), np.uint8))
    json = compare(statistics_of(tmp_path / "b.npz", vit), statistics_of(folder, vit), vit).to_json()
    assert json["samples"]["n"] == 4 and json["reference"]["n"] == 3
    assert json["samples"]["sha256"] == hashlib.sha256((tmp_path / "b.npz").read_bytes()).hexdigest()
    assert json["samples"]["sha256_of"] == "file" and json["reference"]["sha256_of"] == "pixels"
    assert json["samples"]["size"] == [8, 8] and json["reference"]["size"] == [24, 24]
    assert sum("below 2,048" in warning for warning in json["warnings"]) == 2
    assert any("(8, 8)" in warning for warning in json["warnings"])
    assert json["features"] == TIMM and json["resize"]


def test_a_folders_hash_is_that_of_its_pixels(tmp_path: Path, vit: FeatureNetwork) -> None:
    a, b = write_images(tmp_path / "a", 3, 0), write_images(tmp_path / "b", 3, 0)
    c = write_images(tmp_path / "c", 3, 1)
    hashes = [statistics_of(folder, vit, batch_size=2).sha256 for folder in (a, b, c)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_saved_statistics(tmp_path: Path, vit: FeatureNetwork) -> None:
    one = statistics_of(write_images(tmp_path / "a", 8, 0), vit)
    other = statistics_of(write_images(tmp_path / "b", 8, 1), vit)
    np.savez_compressed(tmp_path / "saved.npz", mu=one.mean, sigma=one.covariance)
    saved = statistics_of(tmp_path / "saved.npz", vit)
    assert saved.count is None and saved.features is None
    score = compare(other, saved, vit)
    assert score.values["value"] == pytest.approx(compare(other, one, vit).values["value"])
    assert score.values["precision"] is None
    np.savez(tmp_path / "short.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(BidmError, match=r"shape \(7,\)"):
        statistics_of(tmp_path / "short.npz", vit)


def test_grayscale_and_mixed_sizes(tmp_path: Path, vit: FeatureNetwork) -> None:
    gray = write_images(tmp_path / "gray", 3, 0, gray=True)
    write_images(tmp_path / "gray" / "large", 2, 1, size=40)
    found = statistics_of(gray, vit)
    assert found.count == 5 and found.size is None and np.isfinite(found.covariance).all()
    with pytest.raises(BidmError, match="at least two"):
        statistics_of(write_images(tmp_path / "one", 1, 0), vit)


def test_batches_do_not_change_the_statistics(tmp_path: Path, vit: FeatureNetwork) -> None:
    folder = write_images(tmp_path / "a", 7, 0)
    a, b = (statistics_of(folder, vit, batch_size=size) for size in (2, 7))
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-5)
    assert a.sha256 == b.sha256


def test_precision_and_recall() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((400, 4)).astype(np.float32)
    same = rng.standard_normal((400, 4)).astype(np.float32)
    assert min(precision_recall(same, reference)) > 0.8
    assert precision_recall(same + 100, reference) == (0.0, 0.0)
    # One mode of two: what is there is right, half of the reference is never reached.
    two = np.concatenate([reference, reference + 100])
    precision, recall = precision_recall(same, two)
    assert precision > 0.8 and 0.35 < recall < 0.55
    assert precision_recall(reference[:2], reference[:2]) == (1.0, 1.0)


def test_precision_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((30, 3)), rng.standard_normal((40, 3)) * 0.7

    def radius(points: np.ndarray, i: int) -> float:
        return float(np.sort(np.linalg.norm(points - points[i], axis=1))[3])

    def share(points: np.ndarray, cover: np.ndarray) -> float:
        inside = [any(np.linalg.norm(p - c) <= radius(cover, j) for j, c in enumerate(cover)) for p in points]
        return float(np.mean(inside))

    assert precision_recall(a, b) == pytest.approx((share(a, b), share(b, a)))


@pytest.fixture
def toy_metric() -> Iterator[None]:
    """A metric registered from outside, as a user's script would."""
    before = list(METRICS)

    @register_metric("mean_gap", text=lambda value: f"{value:.1f} levels")
    def mean_gap(samples: SetStatistics, reference: SetStatistics) -> float:
        return float(np.abs(samples.mean - reference.mean).max()) + 40.0

    yield
    METRICS[:] = before


def test_a_metric_from_outside_is_in_json_text_and_page(
    tmp_path: Path, vit: FeatureNetwork, toy_metric: None
) -> None:
    a, b = (statistics_of(write_images(tmp_path / name, 8, seed), vit) for seed, name in enumerate("ab"))
    score = compare(a, b, vit)
    gap = score.values["mean_gap"]
    names = ["value", "kernel_distance", "precision", "recall", "mean_gap"]
    assert list(score.values) == names and gap is not None and gap > 40
    report = Report([], scores=[score])
    assert report.to_json()["metrics"][0]["mean_gap"] == gap
    for text in (to_text(report), to_html(report)):
        assert "mean gap" in text and f"{gap:.1f} levels" in text


def test_names_of_metrics_are_taken_once() -> None:
    before = list(METRICS)
    with pytest.raises(ValueError, match="'recall'"):
        register_metric("new", "recall")(lambda samples, reference: None)
    assert before == METRICS


def test_missing_weights_say_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(MissingWeights) as caught:
        load_features("inception")
    message = str(caught.value)
    assert "pt_inception-2015-12-05-6726825d.pth" in message and str(tmp_path / "checkpoints") in message
    assert "`weights`" in message and "\n" not in message
    assert "Downloading" in capsys.readouterr().err, "a download is never silent"


def test_cached_weights_are_used_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_file: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_FILE).symlink_to(inception_file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
    assert load_features("inception").dims == 2048


def test_timm_without_weights_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(MissingWeights, match="`weights` FILE"):
        load_features("timm:test_vit2")
    with pytest.raises(BidmError, match="timm has no model"):
        load_features("timm:no_such_network")


def test_weights_that_do_not_fit(tmp_path: Path, timm_file: Path) -> None:
    with pytest.raises(BidmError, match="does not hold pytorch-fid's Inception"):
        load_features("inception", timm_file)
    with pytest.raises(BidmError, match="does not fit"):
        load_features("timm:test_resnet", timm_file)
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(BidmError, match="cannot be read as weights"):
        load_features("inception", tmp_path / "junk.pth")
    with pytest.raises(BidmError, match="there is no file"):
        load_features("inception", tmp_path / "gone.pth")
    with pytest.raises(BidmError, match="unknown feature network"):
        load_features("vgg")


class Trap:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/bidm-weights-trap"),))


def test_weights_are_never_executed(tmp_path: Path) -> None:
    Path("/tmp/bidm-weights-trap").unlink(missing_ok=True)
    torch.save({"w": Trap()}, tmp_path / "evil.pth")
    with pytest.raises(BidmError, match="cannot be read as weights"):
        load_features("inception", tmp_path / "evil.pth")
    assert not Path("/tmp/bidm-weights-trap").exists()
