"""Labels: where data sets keep them, how they meet a model's classes, and what is refused."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bidm_cli.data.image_files import ImageSet
from bidm_cli.data.image_sets import read_image_set
from bidm_cli.data.labels import FOLDERS, Labels, folder_labels, named
from bidm_cli.errors import BidmError


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, *names: str, **files: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(picture())
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def labels_of(images: ImageSet, classes: int, null: int | None = None) -> list[int]:
    return images.labelling.of_model(classes, null, "data")[0].tolist()


def text_of(images: ImageSet, classes: int, null: int | None = None) -> str:
    return images.labelling.of_model(classes, null, "data")[1]


def test_as_many_folders_as_classes_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    images = read_image_set(folder(tmp_path, "b/1.png", "a/1.png", "c/1.png"))
    assert labels_of(images, 3) == [0, 1, 2] and "a = 0, b = 1, c = 2" in text_of(images, 3)
    assert labels_of(images, 4, null=3) == [0, 1, 2]
    assert labels_of(images, 4, null=0) == [1, 2, 3]


@pytest.mark.parametrize("classes", [2, 4])
def test_fewer_or_more_folders_are_refused_with_what_they_would_become(tmp_path: Path, classes: int) -> None:
    path = folder(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    with pytest.raises(BidmError, match=r"3 class folders.*a = 0, b = 1, c = 2.*`data_labels`"):
        labels_of(read_image_set(path), classes)
    asked = read_image_set(path, "folders")
    if classes == 4:
        assert labels_of(asked, classes) == [0, 1, 2]
    else:
        with pytest.raises(BidmError, match="3 class folders"):
            labels_of(asked, classes)


def test_a_folder_more_for_the_null_label_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(BidmError, match="3 class folders for a model of 2 classes"):
        labels_of(read_image_set(folder(tmp_path, "a/1.png", "b/1.png", "c/1.png")), 3, null=2)


@pytest.mark.parametrize(
    "names, classes, expected",
    [
        (["0", "1", "10", "2"], 11, [0, 1, 10, 2]),  # numbers within the classes are the labels
        (["1", "10", "2", "3"], 4, [0, 3, 1, 2]),  # from 1: in numeric order
        (["007", "012"], 13, [7, 12]),
        (["class_0", "class_1", "class_10", "class_2"], 4, [0, 1, 3, 2]),
        (["c0", "c1", "c2"], 3, [0, 1, 2]),
    ],
)
def test_numbers_in_folder_names(names: list[str], classes: int, expected: list[int]) -> None:
    labels = folder_labels([f"{name}/{i}.png" for i, name in enumerate(names)])
    found, text = labels.of_model(classes, None, "data")
    assert found.tolist() == expected
    if names[0].isdigit() and max(map(int, names)) < classes:
        assert "taken as the labels" in text


def test_numbers_beyond_the_classes_and_too_few_are_refused() -> None:
    with pytest.raises(BidmError, match="the order of their numbers"):
        folder_labels(["1/a.png", "20/a.png", "3/a.png"]).of_model(10, None, "data")


@pytest.mark.parametrize(
    "names, classes",
    [
        (["train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png"], ["cat", "dog"]),
        (["Training/a/1.png", "testing/b/1.png"], ["a", "b"]),
        (["set/train2017/a/1.png", "set/val2017/b/1.png"], ["a", "b"]),
        (["train/images/a/1.png", "test/images/b/1.png"], ["a", "b"]),
        (["train/1.png", "bus/1.png"], ["bus", "train"]),  # vehicles, not splits
    ],
)
def test_splits_are_no_classes(names: list[str], classes: list[str]) -> None:
    assert list(folder_labels(names).names or ()) == classes


def test_splits_without_classes_have_no_labels() -> None:
    labels = folder_labels(["train/1.png", "test/2.png"])
    assert labels.numbers is None and "splits" in labels.notes[0]
    with pytest.raises(BidmError, match="no labels"):
        labels.of_model(2, None, "data")


@pytest.mark.parametrize(
    "names",
    [
        ["00000/img00000000.png", "00001/img00001000.png"],  # NVlabs
        ["00000/00012.png", "01000/01999.png"],  # FFHQ
        ["00000/000000123.jpg", "00012/000120000.jpg"],  # img2dataset
    ],
)
def test_numbered_folders_of_numbered_files_are_no_classes(names: list[str]) -> None:
    with pytest.raises(BidmError, match=r"no classes.*`data_labels`"):
        folder_labels(names).of_model(2000, None, "data")
    assert folder_labels(names, asked=True).numbers is not None


@pytest.mark.parametrize("packed", [False, True])
def test_dataset_json(tmp_path: Path, packed: bool) -> None:
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]
    entries = [[name, label] for name, label in zip(names, (7, 0, 7), strict=True)]
    for content, expected in (
        ({"labels": entries}, [7, 0, 7]),
        ({"labels": [[name, [0, 0, 1]] for name in names]}, [2, 2, 2]),
        ({"labels": None}, None),
        ({}, None),
        ({"labels": entries[:2]}, None),
        ({"labels": [[1, 2, 3]]}, None),
    ):
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}.zip"
        if packed:
            with zipfile.ZipFile(place, "w") as archive:
                for name in names:
                    archive.writestr(name, picture())
                archive.writestr("dataset.json", json.dumps(content))
        else:
            folder(place, *names, dataset__json=json.dumps(content))
        images = read_image_set(place)
        assert (None if images.labels is None else images.labels.tolist()) == expected
        if expected is None:
            with pytest.raises(BidmError, match=r"dataset\.json.*`data_labels`"):
                labels_of(images, 10)
        assert read_image_set(place, "folders").labels is not None


@pytest.mark.parametrize(
    "file, text, expected",
    [
        ("metadata__csv", "file_name,label\n1.png,3\nsub/2.png,1\n", [3, 1]),
        (
            "metadata__jsonl",
            '{"file_name": "1.png", "class": 3}\n{"file_name": "sub/2.png", "class": 0}\n',
            [3, 0],
        ),
        ("metadata__csv", "\ufefffile_name;text;label\n1.png;a;dog\nsub/2.png;b;cat\n", [1, 0]),
        ("metadata__csv", "file_name,text\n1.png,x\nsub/2.png,y\n", None),
        ("metadata__csv", "file_name,label\n1.png,3\n", None),
        ("metadata__jsonl", "not json\n", None),
    ],
)
def test_metadata_of_hugging_face(tmp_path: Path, file: str, text: str, expected: list[int] | None) -> None:
    images = read_image_set(folder(tmp_path, "1.png", "sub/2.png", **{file: text}))
    assert (None if images.labels is None else images.labels.tolist()) == expected
    if expected is None:
        with pytest.raises(BidmError, match=r"metadata.*`data_labels`"):
            labels_of(images, 10)


def test_metadata_of_each_split(tmp_path: Path) -> None:
    folder(tmp_path, "train/1.png", "test/1.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n1.png,4\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n1.png,2\n")
    assert labels_of(read_image_set(tmp_path), 5) == [2, 4]


def test_file_names_of_guided_diffusion_only_when_asked(tmp_path: Path) -> None:
    path = folder(tmp_path, "10_a.png", "10_b.png", "9_a.png", "9_b.png")
    with pytest.raises(BidmError, match="`data_labels`=names"):
        labels_of(read_image_set(path), 2)
    assert labels_of(read_image_set(path, "names"), 2) == [0, 0, 1, 1]  # as text, as the original sorts
    with pytest.raises(BidmError, match="2 file-name prefixes for a model of 3"):
        labels_of(read_image_set(path, "names"), 3)


@pytest.mark.parametrize(
    "file, text",
    [
        ("map.json", '{"cat": 5, "dog": 2}'),
        ("map.yaml", "cat: 5\ndog: 2\n"),
        ("map.csv", "folder,label\ncat,5\ndog,2\n"),
        ("map.txt", "cat 5\ndog 2\n"),
        ("files.csv", "cat/1.png,5\ncat/2.png,5\ndog/3.png,2\n"),
        ("base.tsv", "1.png\t5\n2.png\t5\n3\t2\n"),
        ("pairs.json", '{"labels": [["cat/1.png", 5], ["2.png", 5], ["dog", 2]]}'),
    ],
)
def test_files_of_labels(tmp_path: Path, file: str, text: str) -> None:
    path = folder(tmp_path / "data", "cat/1.png", "cat/2.png", "dog/3.png")
    (tmp_path / file).write_text(text)
    assert labels_of(read_image_set(path, tmp_path / file), 6) == [5, 5, 2]
    with pytest.raises(BidmError, match="go up to 5, the model has 5 classes"):
        labels_of(read_image_set(path, tmp_path / file), 5)


def test_arrays_of_labels(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", "1.png", "2.png")
    np.save(tmp_path / "y.npy", np.array([[4], [1]]))
    np.savez(tmp_path / "y.npz", y=np.eye(5, dtype=np.float32)[[4, 1]])
    for name in ("y.npy", "y.npz"):
        assert labels_of(read_image_set(path, tmp_path / name), 5) == [4, 1]
    np.save(tmp_path / "y.npy", np.array([4, 1, 2]))
    with pytest.raises(BidmError, match="2 images need 2 integer labels"):
        read_image_set(path, tmp_path / "y.npy")


@pytest.mark.parametrize(
    "file, text",
    [("m.json", "[" * 100_000), ("m.json", '{"cat": 5}'), ("m.yaml", "a: [b"), ("m.csv", "a,b,c\n1,2,3\n"),
     ("m.json", '{"cat": [1, 2], "dog": 1}'), ("m.csv", ""), ("m.json", "\x00\xff")],
)  # fmt: skip
def test_bad_files_of_labels_are_one_line(tmp_path: Path, file: str, text: str) -> None:
    path = folder(tmp_path / "data", "cat/1.png", "dog/3.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(BidmError) as error:
        read_image_set(path, tmp_path / file)
    assert "\n" not in str(error.value)
    with pytest.raises(BidmError, match="no such file"):
        read_image_set(path, "nothing.json")


def test_imagenet_folders(tmp_path: Path) -> None:
    path = folder(tmp_path, "n01440764/1.png", "n02099601/1.png", "n02123045/1.png")
    with pytest.raises(BidmError, match="`data_labels`=imagenet"):
        labels_of(read_image_set(path), 1001, null=1000)
    assert labels_of(read_image_set(path, "imagenet"), 1001, null=1000) == [0, 207, 281]
    folder(tmp_path, "cat/1.png")
    with pytest.raises(BidmError, match="cat"):
        labels_of(read_image_set(path, "imagenet"), 1000)


def test_a_thousand_wnids_are_said_to_be_in_imagenet_s_order() -> None:
    labels = named(FOLDERS, [f"n{i:08d}" for i in range(1000)])
    assert "ImageNet's order" in labels.of_model(1000, None, "data")[1]


def test_numbers_of_an_npz(tmp_path: Path) -> None:
    def read(**arrays: np.ndarray) -> ImageSet:
        np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), **arrays)
        return read_image_set(tmp_path / "a.npz")

    assert labels_of(read(labels=np.array([0, 3])), 4) == [0, 3]
    assert labels_of(read(labels=np.array([[0.0], [3.0]])), 4) == [0, 3]
    assert labels_of(read(y=np.eye(4)[[0, 3]]), 4) == [0, 3]
    assert read(y=np.array([0.5, 1.5])).labels is None
    with pytest.raises(BidmError, match="count from 1"):
        labels_of(read(labels=np.array([1, 4])), 4)
    assert "4 for no class" in text_of(read(labels=np.array([1, 4])), 5, null=4)
    with pytest.raises(BidmError, match="go down to -1"):
        labels_of(read(labels=np.array([-1, 2])), 4)
    with pytest.raises(BidmError, match="neither folders nor file names"):
        read_image_set(tmp_path / "a.npz", "folders")


def test_taking_some_images_keeps_the_numbers_of_all() -> None:
    labels = named(FOLDERS, ["a", "b", "c"])
    smaller = labels.take(np.array([2]))
    assert isinstance(smaller, Labels) and smaller.of_model(3, None, "data")[0].tolist() == [2]
