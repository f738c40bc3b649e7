"""The look at all files: bad ones are named, good ones are kept, and what was seen is not read again."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bidm_cli.data import decode as decoding
from bidm_cli.data import image_check
from bidm_cli.data.image_check import check_images
from bidm_cli.data.image_files import FileImages
from bidm_cli.data.image_sets import read_image, read_image_set
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter


@pytest.fixture(params=[True, False], ids=["small", "large"])
def folder(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve good images; sets are decoded whole, or looked at by headers and ends."""
    if not request.param:
        monkeypatch.setattr(image_check, "DECODED_IMAGES", 0)
    path = tmp_path / "set"
    path.mkdir()
    random = np.random.default_rng(0)
    for i, suffix in enumerate(("jpg", "png", "webp", "bmp", "tif", "ppm") * 2):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path / f"{i:02d}.{suffix}")
    return path


def look(path: Path, **how) -> image_check.ImageCheck:
    images = read_image_set(path)
    assert isinstance(images, FileImages)
    return check_images(images, **how)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_good_images_are_all_kept(folder: Path) -> None:
    check = look(folder)
    assert not check.bad and len(check.kept) == 12 and set(check.sizes) == {(40, 40)}


@pytest.mark.parametrize("name", ["00.jpg", "01.png", "02.webp", "03.bmp", "04.tif", "05.ppm"])
def test_truncated_files_of_every_kind(folder: Path, name: str) -> None:
    cut(folder / name)
    ((bad, problem),) = look(folder).bad
    assert (bad == name and "readable" in problem) or "Pillow" in problem


def test_other_faults_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "20.png").write_bytes(b"")
    (folder / "21.png").write_bytes(b"<html>not found</html>")
    (folder / "22.png").symlink_to(folder / "gone.png")
    Image.fromarray(np.ones((2, 2), np.float32)).save(folder / "23.tif")
    Image.fromarray(np.ones((2, 2), np.int32)).save(folder / "24.tif")
    (folder / "25.jpg").write_bytes((folder / "00.jpg").read_bytes()[:-200] + bytes(200))
    os.mkfifo(folder / "26.jpg")
    Image.new("L", (60, 60)).save(folder / "27.png")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 2500)
    problems = dict(look(folder).bad)
    assert list(problems) == [f"{i}.{s}" for i, s in zip(
        range(20, 28), ("png", "png", "png", "tif", "tif", "jpg", "jpg", "png"), strict=True)]  # fmt: skip
    for name, words in {
        "20.png": "empty", "21.png": "Pillow", "22.png": "gone", "23.tif": "'F'", "24.tif": "'I'",
        "25.jpg": "truncated", "26.jpg": "regular", "27.png": "64 megapixels",
    }.items():  # fmt: skip
        assert words in problems[name], (name, problems[name])


def test_ends_that_others_add_are_no_fault(folder: Path) -> None:
    for name, more in (("00.jpg", b"\0" * 64), ("01.png", b"trailing"), ("06.jpg", b"SEFT trailing data")):
        (folder / name).write_bytes((folder / name).read_bytes() + more)
    Image.fromarray(np.full((3, 3), 500, np.uint16)).save(folder / "30.png")
    assert not look(folder).bad


def test_zips(folder: Path, tmp_path: Path) -> None:
    cut(folder / "00.jpg")
    whole = folder / "01.png"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)
        check = look(tmp_path / "set.zip")
        assert [name for name, _ in check.bad] == ["00.jpg"]
        assert check.digest() == look(folder).digest()  # wherever the same files lie
    content = (tmp_path / "set.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        place = archive.getinfo("01.png").header_offset + 60
    (tmp_path / "set.zip").write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    assert {name for name, _ in look(tmp_path / "set.zip").bad} == {"00.jpg", whole.name}


def test_large_stored_entries_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bidm_cli.data.image_files.STORED_WHOLE", 100)
    monkeypatch.setattr(image_check, "DECODED_IMAGES", 0)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", buffer.getvalue())
        archive.writestr("b.png", buffer.getvalue()[:-100])
    check = look(tmp_path / "set.zip")
    assert check.sizes == [(60, 50)] and [name for name, _ in check.bad] == ["b.png"]


def test_the_digest_sees_names_and_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    before = look(folder).digest()
    folder.rename(tmp_path / "moved")
    assert look(tmp_path / "moved").digest() == before
    (tmp_path / "moved" / "00.jpg").rename(tmp_path / "moved" / "99.jpg")
    assert look(tmp_path / "moved").digest() != before


def test_what_was_seen_is_kept_by_name_size_and_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_check, "CACHED_IMAGES", 1)
    looked: list[tuple[str, int]] = []
    reporter = Reporter(stage=lambda name, total: looked.append((name, total)))
    first = look(folder, reporter=reporter)
    cut(folder / "00.jpg")
    for _ in range(2):
        again = look(folder, reporter=reporter)
        assert [name for name, _ in again.bad] == ["00.jpg"]
    assert [total for _, total in looked] == [12, 1, 1]  # a bad file is looked at each time
    assert first.facts[1:] == again.facts[1:]
    for file in (tmp_path / "cache" / "bidm").iterdir():
        file.write_bytes(b"damaged")
    assert len(look(folder).kept) == 11


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("value, corner", [(3, "br"), (6, "tr"), (8, "bl")])
def test_orientation_is_upright_for_training_and_ignored_for_fid(
    tmp_path: Path, suffix: str, value: int, corner: str
) -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    upright = read_image(tmp_path / f"a.{suffix}")
    place = {"br": (-2, -2), "tr": (1, -2), "bl": (-2, 1)}[corner]
    assert upright[place].min() > 200 and upright.shape[0] == (32 if value == 3 else 48)
    if suffix != "tif":  # Pillow turns these by itself, so pytorch-fid's are upright, too
        stored = read_image_set(tmp_path, upright=False)
        pixels = stored[0]
        assert pixels.shape == (32, 48, 3) and pixels[1, 1].min() > 200
        assert isinstance(stored, FileImages) and stored.lying == 1
    check = look(tmp_path)
    assert check.sizes == [(48, 32) if value == 3 else (32, 48)] or suffix == "tif"


def test_damage_to_the_pixels_of_a_png_is_no_black_image(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    content = bytearray((tmp_path / "a.png").read_bytes())
    place = content.index(b"IDAT") + 6
    content[place : place + 8] = b"\xff" * 8
    (tmp_path / "a.png").write_bytes(bytes(content))
    with pytest.raises(BidmError, match="broken data stream"):
        read_image(tmp_path / "a.png")


def test_damaged_exif_data_beside_sound_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert read_image(tmp_path / "a.jpg").shape == (8, 8, 3) and not look(tmp_path).bad
