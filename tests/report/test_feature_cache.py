"""Features kept from one call to the next: found by content, bounded, never trusted when damaged."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bidm_cli.data.image_sets import read_image_set
from bidm_cli.errors import BidmError
from bidm_cli.report.metrics import feature_cache
from bidm_cli.report.metrics.base import SetStatistics, statistics_of
from bidm_cli.report.metrics.compare import compare
from bidm_cli.report.metrics.networks.base import FeatureNetwork
from bidm_cli.report.pages.page import to_html
from bidm_cli.report.pages.render import to_text
from bidm_cli.report.pages.summary import Report

WEIGHTS = torch.randn(3 * 64, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bidm"


class Counting(FeatureNetwork):
    """Six features, and the number of images that they were computed of."""

    def __init__(self, name: str = "timm:fake", weights: str = "ab" * 32, resize: str = "none") -> None:
        super().__init__(name, 6, resize, weights, False, self._features, torch.device("cpu"))
        self.seen = 0

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x.flatten(1) @ WEIGHTS


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def write_folder(path: Path, suffix: str = "bmp") -> Path:
    path.mkdir()
    for i, image in enumerate(pixels()):
        Image.fromarray(image).save(path / f"{i}.{suffix}")
    return path


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(pixels()):
            Image.fromarray(image).save(file := io.BytesIO(), "PNG")
            archive.writestr(f"{i}.png", file.getvalue())
    return path


def write_npz(path: Path) -> Path:
    np.savez(path, images=pixels())
    return path


def write_npy(path: Path) -> Path:
    np.save(path, pixels())
    return path


def write_saved(path: Path) -> Path:
    """A guided-diffusion batch: moments of a data set beside some images."""
    np.savez(path, arr_0=pixels(), mu=np.zeros(6), sigma=np.eye(6))
    return path


SETS: dict[str, Callable[[Path], Path]] = {
    "folder": write_folder, "a.zip": write_zip, "a.npz": write_npz, "a.npy": write_npy,
    "saved.npz": write_saved,
}  # fmt: skip


def found(path: Path, network: FeatureNetwork) -> SetStatistics:
    return statistics_of(path, network, cached=True)


def entry(cache: Path) -> Path:
    (path,) = cache.glob("features-*.npz")
    return path


@pytest.mark.parametrize("name", SETS)
def test_a_second_call_computes_nothing(name: str, tmp_path: Path, cache: Path) -> None:
    path, network = SETS[name](tmp_path / name), Counting()
    plain, first, second = statistics_of(path, network), found(path, network), found(path, network)
    assert network.seen == 10 and (first.is_cached, second.is_cached) == (False, True)
    assert first.notes == plain.notes and str(entry(cache)) in " ".join(second.notes)
    for field in ("count", "sha256", "hashed", "size", "sizes", "is_saved"):
        assert getattr(second, field) == getattr(plain, field)
    for field in ("mean", "covariance", "features"):
        np.testing.assert_array_equal(getattr(second, field), getattr(plain, field))


def test_nothing_is_kept_unasked(tmp_path: Path, cache: Path) -> None:
    statistics_of(write_folder(tmp_path / "a"), Counting())
    assert not cache.exists()


def change(path: Path) -> None:
    """Another pixel in the middle; size and times as before."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    if path.suffix == ".npz":
        np.savez(path, images=pixels() ^ np.eye(8, dtype=np.uint8)[..., None])
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["folder", "a.npz", "a.npy"])
def test_a_change_of_the_same_size_and_time_is_noticed(name: str, tmp_path: Path) -> None:
    path, network = SETS[name](tmp_path / name), Counting()
    before = found(path, network)
    change(path / "2.bmp" if path.is_dir() else path)
    after = found(path, network)
    assert not after.is_cached and after.sha256 != before.sha256 and network.seen == 10
    assert (after.mean != before.mean).any()


def test_images_added_taken_away_or_exchanged_are_noticed(tmp_path: Path) -> None:
    path, network = write_folder(tmp_path / "a"), Counting()
    found(path, network)
    Image.fromarray(pixels(1)[0]).save(path / "9.bmp")
    assert not found(path, network).is_cached
    (path / "9.bmp").unlink()
    assert found(path, network).is_cached, "as at first"
    (path / "0.bmp").rename(path / "8.bmp")
    assert not found(path, network).is_cached, "their order is that of the features"
    (path / "1.bmp").unlink()
    assert not found(path, network).is_cached


def test_the_same_files_elsewhere_are_known(tmp_path: Path) -> None:
    network = Counting()
    found(write_folder(tmp_path / "a"), network)
    moved = (tmp_path / "a").rename(tmp_path / "b")
    for file in moved.iterdir():
        os.utime(file)
    (moved / "sample.json").write_text(json.dumps({"settings": {"steps": 7}}))
    again = found(moved, network)
    assert again.is_cached and again.path == moved and again.settings == {"steps": 7}


def test_other_networks_and_libraries_are_kept_apart(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, networks = write_npz(tmp_path / "a.npz"), [Counting(), Counting(weights="cd" * 32)]
    networks += [Counting(resize="to 8x8"), Counting(name="timm:other")]
    networks.append(Counting())
    networks[-1].device = torch.device("meta")
    monkeypatch.setattr(Counting, "extract", lambda self, images: images[:, 0, :2].reshape(-1, 6).astype("f"))
    assert not any(found(path, network).is_cached for network in networks)
    assert len(list(cache.iterdir())) == len(networks)
    monkeypatch.setattr(feature_cache, "_version", lambda package: "99")
    assert not found(path, networks[0]).is_cached and found(path, networks[0]).is_cached


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.rindex(b"NUMPY") + 150] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"junk" * 100),
    "a bit flipped": flip,
    "other arrays": lambda path: np.savez(path, values=np.zeros((5, 6), np.float32)),
    "another shape": lambda path: resaved(path, np.zeros((4, 6), np.float32)),
    "another type": lambda path: resaved(path, np.zeros((5, 6))),
    "pickled": lambda path: resaved(path, np.array([[None] * 6] * 5)),
    "other JSON": lambda path: resaved(path, np.zeros((5, 6), np.float32), b'{"sizes": 3}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def resaved(path: Path, values: np.ndarray, about: bytes | None = None) -> None:
    with np.load(path) as stored:
        text = stored["about"] if about is None else np.frombuffer(about, np.uint8)
    np.savez(path, about=text, values=values)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_anew(damage: str, tmp_path: Path, cache: Path) -> None:
    path, network = write_folder(tmp_path / "a"), Counting()
    first = found(path, network)
    DAMAGES[damage](entry(cache))
    second = found(path, network)
    assert not second.is_cached and network.seen == 10
    np.testing.assert_array_equal(first.mean, second.mean)
    if damage != "a folder":
        assert found(path, network).is_cached and network.seen == 10, "written anew"


def test_the_longest_unused_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npz(tmp_path / "a.npz")
    first, second, third, fourth = (Counting(weights=letter * 64) for letter in "abcd")
    found(path, first)
    size = entry(cache).stat().st_size
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 3 * size)
    left = cache / ".features-left.0123abcd.npz"
    left.write_bytes(bytes(size))
    (cache / "images-0.npz").write_bytes(bytes(9 * size))
    for age, file in enumerate([left, entry(cache)], 1):
        os.utime(file, (age, age))
    found(path, second)
    assert left.exists(), "of a killed process: the limit is reached, not passed"
    assert found(path, first).is_cached, "no longer the one that was unused for longest"
    found(path, third)
    assert not left.exists()
    os.utime(max(cache.glob("features-*"), key=lambda file: file.stat().st_mtime_ns), (3, 3))
    found(path, fourth)
    assert len(list(cache.glob("*features-*"))) == 3 and (cache / "images-0.npz").exists(), "not its own"
    kept = [network for network in (first, second, third, fourth) if known(path, network)]
    assert kept == [first, second, fourth]


def known(path: Path, network: FeatureNetwork) -> bool:
    """True if there is an entry."""
    place = feature_cache._entry(read_image_set(path), network, False)
    return place is not None and place.is_file()


def test_more_than_half_of_the_limit_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 2 * 5 * 6 * 4 - 1)
    path, network = write_npz(tmp_path / "a.npz"), Counting()
    for _ in range(2):
        one = found(path, network)
        assert not one.is_cached and "too many to be kept" in " ".join(one.notes)
    assert not cache.exists()


def test_what_changes_meanwhile_is_not_kept(tmp_path: Path, cache: Path) -> None:
    path, network = write_folder(tmp_path / "a"), Counting()
    plain = network.forward

    def changing(x: torch.Tensor) -> torch.Tensor:
        Image.fromarray(pixels(1)[0]).resize((9, 9)).save(path / "0.bmp")
        return plain(x)

    network.forward = changing
    found(path, network)
    assert not cache.exists()


def test_images_on_their_side_are_still_named(tmp_path: Path) -> None:
    path, network = write_folder(tmp_path / "a", "jpg"), Counting()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels()[0]).save(path / "0.jpg", exif=exif)
    first, second = found(path, network), found(path, network)
    assert (
        second.is_cached
        and second.notes[: len(first.notes)] == first.notes
        and "1 images lie" in first.notes[0]
    )


@pytest.mark.parametrize("reason", ["no home", "a file in the way"])
def test_without_a_place_nothing_is_kept(
    reason: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home folder")

    if reason == "no home":
        monkeypatch.setattr(feature_cache, "cache_folder", homeless)
    else:
        cache.parent.write_text("a file")
    path, network = write_folder(tmp_path / "a"), Counting()
    assert not found(path, network).is_cached and not found(path, network).is_cached


def test_a_damaged_image_is_still_one_clear_error(tmp_path: Path, cache: Path) -> None:
    path = write_folder(tmp_path / "a")
    (path / "3.bmp").write_bytes(b"junk")
    for _ in range(2):
        with pytest.raises(BidmError, match=r"3\.bmp"):
            found(path, Counting())
    assert not cache.exists()


def test_text_page_and_json_say_it(tmp_path: Path, cache: Path) -> None:
    path, network = write_npz(tmp_path / "a.npz"), Counting()
    first, second = found(path, network), found(path, network)
    score = compare(replace(first, path=tmp_path / "b.npz"), second, network)
    report = Report([], scores=[score])
    for text in (to_text(report), to_html(report)):
        assert f"reference: features as kept at an earlier call ({entry(cache)})" in text
    json_score = report.to_json()["metrics"][0]
    assert json_score["reference"]["cached"] is True and json_score["samples"]["cached"] is False
    assert str(entry(cache)) in str(json_score["reference"]["notes"])


def test_large_features_are_kept_without_taking_them_into_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written block by block, each given back; numpy reads the entry."""
    released: list[int] = []
    monkeypatch.setattr(feature_cache, "BLOCK", 2)
    monkeypatch.setattr(feature_cache, "release", lambda array: released.append(len(array)))
    path, network = write_folder(tmp_path / "a"), Counting()
    first = found(path, network)
    (entry,) = cache.glob("features-*.npz")
    with np.load(entry) as kept:
        np.testing.assert_array_equal(kept["values"], first.features)
        assert kept["values"].dtype == np.float32
    assert released.count(5) == 3, "5 images in blocks of 2"
    second = found(path, network)
    assert second.is_cached
    np.testing.assert_array_equal(second.features, first.features)
