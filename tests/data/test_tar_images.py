"""Images in tar archives and webdataset shards: as in a folder, and hostile archives give one clear line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bidm_cli.data import image_check, image_files, npz, tar_headers, tar_index
from bidm_cli.data.image_check import check_images
from bidm_cli.data.image_files import FileImages
from bidm_cli.data.image_sets import read_image_set
from bidm_cli.data.tar_images import shards_of
from bidm_cli.errors import BidmError
from tests.data.test_image_sets import pixels, png, write_folder, write_zip

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PNG = png(pixels(1)[0])


def write_tar(path: Path, entries: dict[str, bytes], mode: str = "w", form: str = "pax") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=FORMATS[form]) as archive:
        for name, content in entries.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def add(path: Path, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **more) -> None:
    with tarfile.open(path, "a") as archive:
        about = tarfile.TarInfo(name)
        about.type, about.size = kind, len(content)
        for key, value in more.items():
            setattr(about, key, value)
        archive.addfile(about, io.BytesIO(content))


def notes(path: Path) -> str:
    return "; ".join(read_image_set(path).notes)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_and_folder_give_the_same_pixels_and_digest(tmp_path: Path, mode: str, form: str) -> None:
    long = "a" * 90 + "/" + "b" * 90 + "/é.png"
    entries = {f"{i:03d}.png": png(image) for i, image in enumerate(pixels(4))} | {long: PNG}
    folder = read_image_set(write_folder(tmp_path / "folder", entries))
    for name in ("set.tar", "set"):  # by content, too
        found = read_image_set(write_tar(tmp_path / name, entries, mode, form))
        assert list(found.names) == list(folder.names) and found.labels is None
        assert all(np.array_equal(a, b) for a, b in zip(found, folder, strict=True))
        assert isinstance(found, FileImages) and isinstance(folder, FileImages)
        assert check_images(found).digest() == check_images(folder).digest()


@pytest.mark.parametrize("top", ["", "./", "/data/", "train/"])
def test_class_folders_are_labels_and_names_are_relative(tmp_path: Path, top: str) -> None:
    path = write_tar(tmp_path / "s.tar", {top + n: PNG for n in ("cat/1.png", "ape/2.png", "cat/3.png")})
    found = read_image_set(path)
    assert found.class_names == ["ape", "cat"] and found.labels.tolist() == [0, 1, 1]
    assert not any(name.startswith(("/", ".")) for name in found.names)
    assert found[0].shape == (6, 5, 3)


def test_dataset_json_and_users_labels(tmp_path: Path) -> None:
    entries = {"a/1.png": PNG, "b/2.png": PNG}
    labels = json.dumps({"labels": [["a/1.png", 4], ["b/2.png", 2]]}).encode()
    for mode in ("w", "w:gz"):
        path = write_tar(tmp_path / "s.tar", {**entries, "dataset.json": labels}, mode)
        assert read_image_set(path).labels.tolist() == [4, 2]
        assert read_image_set(path, "folders").class_names == ["a", "b"]
    (tmp_path / "y.json").write_text('{"a": 7, "b": 8}')
    assert read_image_set(path, tmp_path / "y.json").labels.tolist() == [7, 8]


def webdataset(path: Path, first: int, count: int = 3, **texts: bytes) -> Path:
    entries = {}
    for i in range(count):
        entries |= {f"{i:06d}.cls": str(first + i).encode(), f"{i:06d}.jpg": PNG, f"{i:06d}.txt": b"a cat"}
        entries[f"{i:06d}.json"] = b"{}"
    return write_tar(path, entries)


@pytest.mark.parametrize("how", ["folder", "braces", "list"])
def test_shards(tmp_path: Path, how: str) -> None:
    for number in range(3):
        webdataset(tmp_path / f"set/train-{number:04d}.tar", number * 10)
    (tmp_path / "set/.train-0000.tar").write_bytes(b"hidden")
    (tmp_path / "set/index.txt").write_text("x")
    names = {"folder": "set", "braces": "set/train-{0000..0002}.tar", "list": "set/train-000{0,1,2}.tar"}
    found = read_image_set(tmp_path / names[how])
    assert len(found) == 9 and found.labels.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert found.names[3] == "train-0001.tar/000000.jpg" and found.labelling.source == ".cls files"
    assert "3 tar archives" in found.notes and found[8].shape == (6, 5, 3)
    assert isinstance(found, FileImages)
    assert [one.shape for one in found.keep(np.array([0, 8]))] == [(6, 5, 3)] * 2
    assert len(check_images(found).kept) == 9


def test_shards_without_cls_take_folders_inside_and_not_their_own_names(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"set/{number:05d}.tar", {"a/0.png": PNG, "b/0.png": PNG})
    assert read_image_set(tmp_path / "set").labels.tolist() == [0, 1, 0, 1]
    write_tar(tmp_path / "flat/0.tar", {"0.png": PNG})
    write_tar(tmp_path / "flat/1.tar", {"0.png": PNG})
    assert read_image_set(tmp_path / "flat").labels is None
    (tmp_path / "y.json").write_text('{"0.tar": 5, "1.tar": 6}')
    assert read_image_set(tmp_path / "flat", tmp_path / "y.json").labels.tolist() == [5, 6]


def test_archives_of_the_same_name_in_several_folders(tmp_path: Path) -> None:
    for split in "ab":
        write_tar(tmp_path / f"set/{split}/0.tar", {"0.png": PNG})
    assert len(read_image_set(tmp_path / "set")) == 2


def test_images_beside_archives_are_the_set_and_archives_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"1.png": PNG})
    webdataset(tmp_path / "set/x.tar", 0)
    assert list(read_image_set(tmp_path / "set").names) == ["1.png"]
    assert "1 tar archives beside the images are not read" in notes(tmp_path / "set")


def test_cls_files_by_name_missing_or_strange(tmp_path: Path) -> None:
    def labels(**texts: bytes):
        entries = {f"{key}.cls": text for key, text in texts.items()}
        return read_image_set(
            write_tar(tmp_path / "s.tar", {"a.png": PNG, "b.png": PNG, **entries})
        ).labelling

    assert labels(a=b"7\n", b=b" 3").index.tolist() == [7, 3]
    assert labels(a=b"dog", b=b"cat").names == ("cat", "dog")
    for texts, words in (
        ({"a": b"7"}, r"no .cls for 1 of 2 images (first b.png)"),
        ({"a": b"7", "b": b""}, "'' as the label of b.png"),
        ({"a": b"7", "b": b"x" * 5000}, "'' as the label of b.png"),
        ({"a": b"7", "b": b"\xff\0"}, ""),
    ):
        assert words in labels(**texts).problem or labels(**texts).index is not None


def test_masks_of_a_sample_are_not_images_of_their_own(tmp_path: Path) -> None:
    entries = {"1.png": PNG, "1.seg.png": PNG, "1.cls": b"0", "2.webp": PNG, "2.jpg": PNG, "2.cls": b"1"}
    found = read_image_set(write_tar(tmp_path / "s.tar", entries))
    assert list(found.names) == ["1.png", "2.jpg"]
    assert "2 further images of the same samples" in "; ".join(found.notes)
    plain = write_tar(tmp_path / "p.tar", {"1.png": PNG, "1.seg.png": PNG})
    assert len(read_image_set(plain)) == 2


def test_the_last_of_a_name_counts(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"1.png": PNG})
    add(path, "1.png", content=png(np.zeros((6, 5, 3), np.uint8)))
    add(path, "./1.png", content=png(np.full((6, 5, 3), 9, np.uint8)))
    found = read_image_set(path)
    assert len(found) == 1 and found[0].max() == found[0].min() == 9
    assert "2 names occur again" in notes(path)


def test_links_devices_and_ways_out_are_left_out_and_said(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"1.png": PNG})
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    add(path, "link.png", tarfile.SYMTYPE, linkname=str(secret))
    add(path, "hard.png", tarfile.LNKTYPE, linkname="1.png")
    add(path, "null.png", tarfile.CHRTYPE)
    add(path, "pipe.png", tarfile.FIFOTYPE)
    add(path, "disk.png", tarfile.BLKTYPE)
    add(path, "../../out.png", content=PNG)
    add(path, "a/../../out.png", content=PNG)
    add(path, "/abs.png", content=PNG)
    add(path, "odd.png", b"Z", content=PNG)
    add(path, ".hidden.png", content=PNG)
    found = read_image_set(path)
    assert list(found.names) == ["1.png", "abs.png"]
    for words in ("3 x device", "2 x link", "2 x name with ..", "1 x entry of another kind"):
        assert words in notes(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "secret.png"]


def test_sparse_files_are_left_out_and_what_follows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    header = bytearray(tarfile.TarInfo("hole.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[124:136] = b"S", b"00000001000\0"
    header[482] = 1
    header[148:156] = b"%06o\0 " % tar_headers.checksum(bytes(header))
    rest = write_tar(tmp_path / "rest.tar", {"1.png": PNG}).read_bytes()
    path.write_bytes(bytes(header) + bytes(512) + bytes(512) + rest)
    assert list(read_image_set(path).names) == ["1.png"] and "1 x sparse file" in notes(path)
    with tarfile.open(path, "w") as archive:
        about = tarfile.TarInfo("hole.png")
        about.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        archive.addfile(about)
        about = tarfile.TarInfo("1.png")
        about.size = len(PNG)
        archive.addfile(about, io.BytesIO(PNG))
    assert list(read_image_set(path).names) == ["1.png"] and "1 x sparse file" in notes(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_archives_that_are_cut_short(tmp_path: Path, mode: str) -> None:
    random = np.random.default_rng(0)
    entries = {f"{i}.png": random.bytes(3000) for i in range(3)}
    whole = write_tar(tmp_path / "s.tar", entries, mode).read_bytes()
    for part in (0.3, 0.5):
        (tmp_path / "cut.tar").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(BidmError) as error:
            read_image_set(tmp_path / "cut.tar")
        assert "cut.tar" in str(error.value) and "\n" not in str(error.value)


def test_every_cut_and_every_flip_of_a_header_is_noticed_or_harmless(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", {"1.png": PNG, "2.png": PNG}, form="ustar").read_bytes()
    second = 512 + -(-len(PNG) // 512) * 512
    path = tmp_path / "x.tar"
    for length in [*range(1, 512, 37), second + 1, second + 511, second + 600]:
        path.write_bytes(whole[:length])
        with pytest.raises(BidmError, match=r"x\.tar"):
            read_image_set(path)
    for place in range(second, second + 512, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(BidmError, match=rf"damaged at byte {second:,}"):
            read_image_set(path)


@pytest.mark.parametrize("size", [1 << 33, 1 << 62, (1 << 88) - 1])
@pytest.mark.parametrize("mode", ["plain", "gz"])
def test_huge_claims(tmp_path: Path, size: int, mode: str) -> None:
    header = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % tar_headers.checksum(bytes(header))
    content = bytes(header) + PNG
    path = tmp_path / "s.tar"
    path.write_bytes(content if mode == "plain" else gzip.compress(content))
    with pytest.raises(BidmError, match="cut short: it ends within 1.png" if mode == "plain" else "claims"):
        read_image_set(path)


def test_bombs_and_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "SUSPECT_BYTES", 1 << 16)
    bomb = write_tar(tmp_path / "bomb.tar.gz", {"x.bin": bytes(1 << 22), "1.png": PNG}, "w:gz")
    with pytest.raises(BidmError, match="would unpack to over"):
        read_image_set(bomb)
    monkeypatch.setattr(tar_index, "SUSPECT_BYTES", npz.SUSPECT_BYTES)
    monkeypatch.setattr(tar_index, "UNPACKED_BYTES", 100)
    with pytest.raises(BidmError, match=r"1 GiB .*plain \.tar.*gunzip s\.tar\.gz"):
        read_image_set(write_tar(tmp_path / "s.tar.gz", {"1.png": PNG, "2.png": PNG}, "w:gz"))
    monkeypatch.setattr(image_files, "MAX_ENTRY_BYTES", len(PNG))
    large = PNG + bytes(9)
    with pytest.raises(BidmError, match=f"claims {len(large):,} bytes"):
        read_image_set(write_tar(tmp_path / "t.tar.xz", {"1.png": large}, "w:xz"))
    found = read_image_set(write_tar(tmp_path / "u.tar", {"1.png": PNG, "2.png": large}))
    with pytest.raises(BidmError, match=rf"2\.png in .* claims {len(large):,} bytes"):
        found[1]
    ((name, problem),) = check_images(found).bad
    assert name == "2.png" and "claims" in problem


def test_names_of_absurd_length_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_headers, "NAME_BYTES", 600)
    for form in ("pax", "gnu"):
        path = write_tar(tmp_path / f"{form}.tar", {"a/" * 800 + "1.png": PNG}, form=form)
        with pytest.raises(BidmError, match=r"damaged at byte .* a name of 1,\d+ bytes"):
            read_image_set(path)


@pytest.mark.parametrize(
    "content", [b"9", b"x path=a\n", b"99 path=a\n", b"-5 path=a\n", b"11 size=-1\n", b"10 size=x\n"]
)
def test_damaged_extended_headers(tmp_path: Path, content: bytes) -> None:
    path = write_tar(tmp_path / "s.tar", {"0.png": PNG})
    add(path, "pax", b"x", content=content)  # nothing has to follow: it is damaged itself
    with pytest.raises(BidmError, match="damaged at byte"):
        read_image_set(path)


def test_nested_archives_are_named(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "n01440764.tar", {"1.png": PNG}).read_bytes()
    with pytest.raises(BidmError, match=r"holds archives \(n01440764.tar, ...\) and no images; unpack it"):
        read_image_set(write_tar(tmp_path / "train.tar", {"n01440764.tar": inner}))
    assert len(read_image_set(write_tar(tmp_path / "b.tar", {"n.tar": inner, "1.png": PNG}))) == 1


def test_what_is_no_tar(tmp_path: Path) -> None:
    for content in (b"", b"x", b"text " * 500, b"\x1f\x8b\x08 nothing", b"\x28\xb5\x2f\xfd" + bytes(600)):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(BidmError, match=r"s\.tar"):
            read_image_set(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(bytes(10240))
    with pytest.raises(BidmError, match="holds no images"):
        read_image_set(tmp_path / "s.tar")
    (tmp_path / "labels.gz").write_bytes(gzip.compress(bytes(5000)))
    with pytest.raises(BidmError, match="neither a folder, a zip or tar"):
        read_image_set(tmp_path / "labels.gz")


def test_a_zip_that_is_called_tar_is_still_a_zip(tmp_path: Path) -> None:
    assert len(read_image_set(write_zip(tmp_path / "s.tar", {"1.png": PNG}))) == 1


def test_archives_without_an_end_mark(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", {"1.png": PNG}).read_bytes()
    end = 512 + -(-len(PNG) // 512) * 512
    for length in (end, 512 + len(PNG)):
        (tmp_path / "s.tar").write_bytes(whole[:length])
        assert len(read_image_set(tmp_path / "s.tar")) == 1


def test_damaged_images_are_left_out_by_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "STORED_WHOLE", 100)
    large = png(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    entries = {"a.png": large, "b.png": large[:-50], "c.png": b"", "d.png": b"text", "e.png": large}
    for whole in (10_000, 0):
        monkeypatch.setattr(image_check, "DECODED_IMAGES", whole)
        check = check_images(read_image_set(write_tar(tmp_path / "s.tar", entries)))
        assert [name for name, _ in check.bad] == ["b.png", "c.png", "d.png"]


def test_patterns(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        webdataset(tmp_path / f"{number}.tar", 0)
        webdataset(tmp_path / f"{number:03d}.tar", 0)
    assert [p.name for p in shards_of(tmp_path / "{8..10}.tar")] == ["8.tar", "9.tar", "10.tar"]
    assert [p.name for p in shards_of(tmp_path / "{010..008}.tar")] == ["010.tar", "009.tar", "008.tar"]
    assert len(shards_of(tmp_path / "{8,{9..10}}.tar")) == 3 and shards_of(Path("a.tar")) is None
    for pattern, words in (
        ("{8..12}.tar", r"2 of 5 files are missing \(first .*11\.tar\)"),
        ("{0..999999999999}.tar", "over 100,000 files"),
        ("{}.tar", "1 of 1 files"),
        ("{a..b}.tar", "1 of 1 files"),
    ):
        with pytest.raises(BidmError, match=words):
            read_image_set(tmp_path / pattern)
    write_folder(tmp_path / "{0..1}", {"1.png": PNG})
    assert len(read_image_set(tmp_path / "{0..1}")) == 1


def test_a_data_worker_can_pickle_it(tmp_path: Path) -> None:
    for mode in ("w", "w:gz"):
        found = read_image_set(write_tar(tmp_path / "s.tar", {"1.png": PNG}, mode))
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(found))[0], found[0])


def test_an_archive_that_changes_while_it_is_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"1.png": PNG})
    found = read_image_set(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BidmError, match=r"1\.png in .*s\.tar is cut short"):
        found[0]
    path.unlink()
    with pytest.raises(BidmError, match=r"1\.png in .*s\.tar"):
        found[0]


def test_large_indices_are_kept_by_path_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "CACHED_FILES", 1)
    path = webdataset(tmp_path / "s.tar", 5)
    add(path, "l.png", tarfile.SYMTYPE, linkname="x")
    first = read_image_set(path)
    entries = tar_index.tar_entries
    monkeypatch.setattr(tar_index, "tar_entries", None)
    again = read_image_set(path)
    assert again.names == first.names and again.notes == first.notes and "1 x link" in again.notes[0]
    assert again.labels.tolist() == [5, 6, 7] and np.array_equal(again[2], first[2])
    monkeypatch.setattr(tar_index, "tar_entries", entries)
    for file in (tmp_path / "cache/bidm").iterdir():
        file.write_bytes(b"damaged")
    assert len(read_image_set(path)) == 3
    add(path, "000009.jpg", content=PNG)
    assert len(read_image_set(path)) == 4
