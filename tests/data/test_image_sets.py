"""Reading image sets: the three containers agree, and hostile or damaged ones give one clear error."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bidm_cli.data import decode, image_files, npz
from bidm_cli.data.image_sets import read_image_set, to_channels
from bidm_cli.data.npz import load_npz_array
from bidm_cli.errors import BidmError


def pixels(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 5, channels), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, entries: dict[str, bytes]) -> Path:
    for name, content in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_zip_and_npz_give_the_same_pixels(tmp_path: Path, channels: int) -> None:
    images = pixels(4, channels)
    entries = {f"{i:03d}.png": png(image) for i, image in enumerate(images)}
    np.savez(tmp_path / "stored.npz", images=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    for path in (
        write_folder(tmp_path / "folder", entries),
        write_zip(tmp_path / "set.zip", entries),
        tmp_path / "stored.npz",
        tmp_path / "packed.npz",
    ):
        found = read_image_set(path)
        assert len(found) == 4 and found.labels is None
        np.testing.assert_array_equal(np.stack(list(found)), images)


def test_stored_arrays_are_mapped_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(3), labels=np.arange(3))
    assert isinstance(load_npz_array(tmp_path / "a.npz", "images"), np.memmap)
    np.testing.assert_array_equal(load_npz_array(tmp_path / "a.npz", "labels"), [0, 1, 2])


@pytest.mark.parametrize("top", ["", "train/"])
def test_class_folders_become_labels(tmp_path: Path, top: str) -> None:
    names = ["cat/1.png", "ape/2.png", "cat/sub/3.png"]
    entries = {top + name: png(pixels(1)[0]) for name in names}
    for path in (write_folder(tmp_path / "folder", entries), write_zip(tmp_path / "set.zip", entries)):
        found = read_image_set(path)
        assert found.class_names == ["ape", "cat"]
        assert found.labels is not None and found.labels.tolist() == [0, 1, 1]


def test_one_folder_or_loose_images_have_no_labels(tmp_path: Path) -> None:
    image = png(pixels(1)[0])
    assert read_image_set(write_folder(tmp_path / "a", {"x/1.png": image, "x/2.png": image})).labels is None
    assert read_image_set(write_folder(tmp_path / "b", {"x/1.png": image, "2.png": image})).labels is None


def test_npz_labels_and_adm_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", pixels(3), np.array([5, 1, 5]))
    labels = read_image_set(tmp_path / "adm.npz").labels
    assert labels is not None and labels.dtype == np.int64 and labels.tolist() == [5, 1, 5]
    np.savez(tmp_path / "bad.npz", images=pixels(3), labels=np.array([5, 1]))
    with pytest.raises(BidmError, match="3 images need 3 integer labels"):
        read_image_set(tmp_path / "bad.npz")


def test_max_value_stretches_to_white(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.array([[[0, 8], [15, 16]]], np.uint8), max_value=np.uint8(16))
    np.testing.assert_array_equal(read_image_set(tmp_path / "d.npz")[0][..., 0], [[0, 128], [239, 255]])


def test_grid_hidden_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    image = png(pixels(1)[0])
    entries = {
        "000000.png": image,
        "grid.png": image,
        ".0.png": image,
        "__MACOSX/0.png": image,
        "n.txt": b"x",
    }
    assert list(read_image_set(write_folder(tmp_path / "f", entries)).names) == ["000000.png"]
    assert list(read_image_set(write_zip(tmp_path / "f.zip", entries)).names) == ["000000.png"]


def test_a_link_back_to_the_folder_does_not_loop(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"a/1.png": png(pixels(1)[0])})
    (tmp_path / "f" / "a" / "back").symlink_to(tmp_path / "f")
    assert len(read_image_set(tmp_path / "f")) == 1


def test_modes(tmp_path: Path) -> None:
    folder = tmp_path / "modes"
    folder.mkdir()
    Image.fromarray(np.full((2, 2, 4), 200, np.uint8), "RGBA").save(folder / "a.png")
    Image.fromarray(np.full((2, 2), 513, np.uint16)).save(folder / "b.png")
    Image.new("1", (2, 2), 1).save(folder / "c.png")
    Image.fromarray(np.ones((2, 2), np.float32)).save(folder / "d.tif")
    found = read_image_set(folder)
    assert found[0].shape == (2, 2, 3) and int(found[0].max()) == 200
    assert found[1].shape == (2, 2, 1) and int(found[1].max()) == 2
    assert found[2].shape == (2, 2, 1) and int(found[2].max()) == 255
    with pytest.raises(BidmError, match=r"d\.tif.*8 bits"):
        found[3]


def test_a_data_worker_can_pickle_and_reopen_a_zip(tmp_path: Path) -> None:
    found = read_image_set(write_zip(tmp_path / "s.zip", {"1.png": png(pixels(1)[0])}))
    expected = found[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found))[0], expected)


def test_to_channels() -> None:
    gray, color = pixels(1, 1)[0], pixels(1, 3)[0]
    np.testing.assert_array_equal(to_channels(gray, 3), np.concatenate([gray] * 3, axis=2))
    assert to_channels(color, 3) is color
    luma = color.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(to_channels(color, 1)[..., 0] - luma).max() <= 1
    with pytest.raises(BidmError, match="4 channels"):
        to_channels(color, 4)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(BidmError, match="no such folder"):
        read_image_set(tmp_path / "gone")
    with pytest.raises(BidmError, match="holds no images"):
        read_image_set(write_folder(tmp_path / "empty", {"a.txt": b"x"}))
    with pytest.raises(BidmError, match="holds no images"):
        read_image_set(write_zip(tmp_path / "empty.zip", {"a.txt": b"x"}))


def test_files_that_are_not_what_they_claim(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"not a zip at all")
    with pytest.raises(BidmError, match="neither a folder, a zip"):
        read_image_set(tmp_path / "x.zip")
    with pytest.raises(BidmError, match=r"1\.png.*not a readable image"):
        read_image_set(write_folder(tmp_path / "f", {"1.png": b"text"}))[0]
    whole = png(pixels(1)[0])
    with pytest.raises(BidmError, match="not a readable image"):
        read_image_set(write_folder(tmp_path / "g", {"1.png": whole[: len(whole) // 2]}))[0]


def test_truncated_and_flipped_zips(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "s.zip", {"1.png": png(pixels(1)[0])}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BidmError, match="cut short"):
        read_image_set(tmp_path / "cut.zip")
    flipped = bytearray(whole)
    flipped[60] ^= 0xFF
    (tmp_path / "flip.zip").write_bytes(flipped)
    with pytest.raises(BidmError, match=r"1\.png in"):
        read_image_set(tmp_path / "flip.zip")[0]


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_ENTRY_BYTES", 1 << 20)
    bomb = write_zip(tmp_path / "bomb.zip", {"1.png": bytes(1 << 21)})
    with pytest.raises(BidmError, match="claims 2,097,152 bytes"):
        read_image_set(bomb)[0]
    monkeypatch.setattr(decode, "MAX_PIXELS", 20)
    with pytest.raises(BidmError, match="5 x 6"):
        read_image_set(write_folder(tmp_path / "f", {"1.png": png(pixels(1)[0])}))[0]
    monkeypatch.setattr(npz, "SUSPECT_BYTES", 1 << 10)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((1000, 32, 32), np.uint8))
    with pytest.raises(BidmError, match="would unpack"):
        read_image_set(tmp_path / "bomb.npz")


def test_arrays_that_are_not_images(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "float32; images are uint8": {"images": np.zeros((2, 4, 4), np.float32)},
        r"shape \(2, 4, 4, 2\)": {"images": np.zeros((2, 4, 4, 2), np.uint8)},
        "the arrays other": {"other": np.zeros(3)},
        "saved statistics": {"mu": np.zeros(3), "sigma": np.eye(3)},
        "max_value": {"images": np.zeros((2, 4, 4), np.uint8), "max_value": np.float64(0)},
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(BidmError, match=message):
            read_image_set(tmp_path / "a.npz")


class Trap:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/bidm-image-trap"),))


def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path) -> None:
    Path("/tmp/bidm-image-trap").unlink(missing_ok=True)
    np.savez(tmp_path / "a.npz", images=np.array([Trap()], dtype=object))
    with pytest.raises(BidmError, match="pickled objects"):
        read_image_set(tmp_path / "a.npz")
    assert not Path("/tmp/bidm-image-trap").exists()


def test_a_wrong_npy_header_is_an_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, pixels(2))
    content = buffer.getvalue().replace(b"(2, 6, 5, 3)", b"(9, 6, 5, 3)")
    write_zip(tmp_path / "a.npz", {"images.npy": content})
    with pytest.raises(BidmError, match="damaged"):
        read_image_set(tmp_path / "a.npz")
