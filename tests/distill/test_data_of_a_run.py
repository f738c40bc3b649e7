"""Data of a run: said, kept, compared on resume; bad images; refused runs leave nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.data import image_check
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.distill.compress import compress
from bidm_cli.distill.data import LatentData, open_data
from bidm_cli.distill.fingerprint import check_same_data
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.training_data import DataOptions
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.read import load_packed
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.report.dry_run import describe
from tests.distill.conftest import TINY, make_teacher
from tests.end_to_end.conditioned import checkpoint


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def folder(path: str, level: int = 50, count: int = 4) -> Path:
    Path(path).mkdir()
    for i in range(count):
        Image.fromarray(np.full((8, 8), level + i, np.uint8)).save(f"{path}/{i}.png")
    return Path(path)


def run(data, teacher=None, recipe=TINY, **kwargs):
    how = {"steps": 1, "run_dir": "run", **kwargs}
    return compress(teacher or make_teacher(), Recipe.parse(recipe), "x.bidm", data=data, **how)


def files(path: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def test_data_are_kept_with_the_run_and_in_the_packed_file():
    said: list[str] = []
    run(folder("mine"), reporter=Reporter(begin=lambda planned: said.append(planned.data)))
    assert said == ["mine: 4 images of 8x8; 0 to 255 scaled to [-1, 1]"]
    kept = json.loads(Path("run/data.json").read_text())
    assert (kept["kind"], kept["name"], kept["count"], kept["left_out"]) == ("images", "mine", 4, 0)
    assert load_packed("x.bidm").provenance["data"] == kept


def test_other_data_do_not_resume_and_moved_ones_do():
    run(folder("mine"))
    before = files("run")
    shutil.copytree("mine", "other")
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save("other/0.png")
    np.savez("array.npz", images=np.zeros((4, 8, 8), np.uint8))
    for data, words in (
        (folder("light", 200), "started with 4 images of mine, not 4 images of light"),
        ("other", "not 4 images of other"),
        (None, r"not samples of the original \(no `data`\)"),
        ("array.npz", "not 4 images of array.npz"),
    ):
        with pytest.raises(BidmError, match=words) as error:
            run(data, resume=True)
        assert "`run_dir`" in str(error.value) and files("run") == before
    Image.fromarray(np.full((8, 8), 5, np.uint8)).save("mine/4.png")
    with pytest.raises(BidmError, match="not 5 images of mine"):
        run("mine", resume=True)
    Path("mine/4.png").unlink()
    Path("elsewhere").mkdir()
    Path("mine").rename("elsewhere/set")
    run("elsewhere/set", resume=True)


def test_synthetic_runs_do_not_go_on_with_images():
    run(None)
    with pytest.raises(BidmError, match="started with samples of the original"):
        run(folder("mine"), resume=True)


def test_runs_of_earlier_versions_resume():
    run(folder("mine"))
    Path("run/data.json").unlink()
    run("mine", resume=True)
    Path("run/data.json").write_text("[]")
    with pytest.raises(BidmError, match=r"data\.json cannot be read"):
        run("mine", resume=True)


def test_other_labels_of_the_same_images_do_not_resume():
    teacher = make_teacher()
    teacher.num_classes = 2
    np.savez("a.npz", images=np.zeros((4, 8, 8), np.uint8))

    def keep(labels: list[int], file: str, resume: bool) -> None:
        if file.endswith(".npy"):
            np.save(file, labels)
        else:
            Path(file).write_text(json.dumps(dict(enumerate(labels))))
        data = ImageData(teacher, "a.npz", options=DataOptions(data_labels=file))
        check_same_data(Path("run"), data.summary, resume)

    keep([0, 1, 1, 0], "y.npy", False)
    keep([0, 1, 1, 0], "y.json", True)
    with pytest.raises(BidmError, match=r"other labels of 4 images of a\.npz"):
        keep([0, 1, 1, 1], "y.npy", True)


def test_another_range_of_the_same_array_does_not_resume():
    x0 = np.random.default_rng(0).uniform(0, 1, (4, 1, 8, 8)).astype(np.float32)
    np.save("x.npy", x0)
    run("x.npy")
    with pytest.raises(BidmError, match="range differ"):
        run("x.npy", resume=True, data_range="as-is")


def test_bad_images_are_left_out_before_the_first_step():
    path = folder("mine", count=5)
    (path / "1.png").write_bytes(b"")
    (path / "3.png").write_bytes((path / "3.png").read_bytes()[:40])
    teacher = make_teacher()
    data = ImageData(teacher, path)
    line = data.summary.line()
    assert len(data) == 3 and "2 left out: 1.png is empty; 3.png" in line
    x0, _ = data.batch(torch.tensor([1, 2]), torch.Generator())
    assert [round((v.item() + 1) * 127.5) for v in x0.mean((1, 2, 3))] == [52, 54]
    with pytest.raises(BidmError, match=r"2 of 5 images .*: 1\.png is empty.*`bad_images`=leave-out"):
        ImageData(teacher, path, options=DataOptions(bad_images="refuse"))
    for file in path.iterdir():
        file.write_bytes(b"x")
    with pytest.raises(BidmError, match="none of 5 images"):
        ImageData(teacher, path)


@pytest.mark.parametrize("rows, expected", [(5, [0, 2, 4]), (3, [0, 1, 2])])
def test_conditions_of_images_that_are_left_out_are_left_out(tmp_path, rows, expected):
    model = load_checkpoint(checkpoint("super-resolution", tmp_path / "original"))
    path = folder("mine", count=5)
    for name in ("1.png", "3.png"):
        (path / name).write_bytes(b"")
    concat = torch.arange(float(rows)).reshape(rows, 1, 1, 1).expand(rows, 3, 8, 8)
    data = ImageData(model, path, ConditionSet(concat=concat))
    assert data.batch(torch.arange(3), torch.Generator())[1].concat[:, 0, 0, 0].tolist() == expected


@pytest.fixture
def fails_late(monkeypatch):
    """Images whose ends are as they should be and that fail when they are decoded."""
    monkeypatch.setattr(image_check, "DECODED_IMAGES", 0)
    random = np.random.default_rng(0)
    Path("mine").mkdir()
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(f"mine/{i}.png")
    content = bytearray(Path("mine/3.png").read_bytes())
    place = content.index(b"IDAT") + 6
    content[place : place + 8] = b"\xff" * 8
    Path("mine/3.png").write_bytes(bytes(content))
    return Path("mine")


def test_an_image_that_fails_while_training_is_left_out_aloud(fails_late):
    said: list[str] = []
    data = ImageData(make_teacher(), fails_late, reporter=Reporter(say=said.append))
    assert len(data) == 8
    x0, _ = data.batch(torch.tensor([3, 4, 3]), torch.Generator())
    assert torch.equal(x0[0], x0[1]) and len(said) == 1 and "3.png" in said[0]
    run(fails_late, steps=12)
    run(fails_late, steps=12, resume=True)


def test_refused_while_training_its_state_is_saved_first(fails_late):
    recipe = TINY.replace("batch_size: 2", "batch_size: 1")
    with pytest.raises(BidmError, match=r"3\.png.*after step \d+ is saved in run.*`resume`"):
        run(fails_late, recipe=recipe, steps=60, bad_images="refuse")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["step"] > 0
    run(fails_late, recipe=recipe, steps=60, resume=True)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("fault", ["data", "optimizer", "range"])
def test_a_refused_run_leaves_nothing_in_the_way(fault, given):
    path: Path | str = folder("mine")
    recipe, where = TINY, {"run_dir": "run"} if given else {"run_dir": None}
    if fault == "data":
        (path / "0.png").write_bytes(b"")
        where["bad_images"] = "refuse"
    elif fault == "optimizer":
        recipe = TINY.replace("amp: off", "amp: off, optimizer: adamx")
    else:
        np.save("x.npy", np.full((4, 1, 8, 8), 7.0, np.float32))
        path = "x.npy"
    with pytest.raises(BidmError):
        run(path, recipe=recipe, **where)
    assert not Path("run").exists() and not list(Path(".").glob("runs/*"))


def test_a_folder_of_the_user_s_stays_as_it_was():
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    with pytest.raises(BidmError):
        run("nothing")
    with pytest.raises(BidmError):
        run(folder("mine"), recipe=TINY.replace("amp: off", "amp: off, optimizer: adamx"))
    assert [file.name for file in Path("run").iterdir()] == ["notes.txt"]
    run("mine")


def test_dry_run_opens_the_data_as_the_run_does():
    teacher, recipe = make_teacher(), Recipe.parse(TINY)
    np.savez("x.npz", images=np.full((4, 1, 8, 8), 7.0, np.float32))
    with pytest.raises(BidmError, match="ranges from 7 to 7"):
        describe(teacher, recipe, Path("x"), DataOptions("x.npz"))
    text = describe(teacher, recipe, Path("x"), DataOptions(folder("mine")))
    assert "mine: 4 images of 8x8" in text
    assert "samples of the original" in describe(teacher, recipe, Path("x"))


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"x_train": np.zeros((4, 8, 8, 1), np.uint8), "y_train": np.zeros(4, int)}, "'x_train' is taken"),
        ({"images": np.zeros((4, 1, 8, 8), np.uint8)}, "channels are taken to come first"),
        ({"images": np.full((4, 8, 8), 255, np.int64)}, "taken as 0 to 255"),
        ({"data": np.zeros((4, 8, 8), bool)}, "false and true"),
        ({"x": np.linspace(-1, 1, 4 * 64).reshape(4, 8, 8, 1)}, "channels last"),
    ],
)
def test_arrays_of_other_names_and_layouts_are_taken_aloud(arrays, words):
    np.savez("x.npz", **arrays)
    data = open_data(make_teacher(), DataOptions("x.npz"), ConditionSet())
    assert words in data.summary.line()
    assert data.batch(torch.tensor([0, 3]), torch.Generator())[0].shape == (2, 1, 8, 8)


def test_several_arrays_to_choose_from_are_named():
    np.savez("x.npz", x_train=np.zeros((4, 8, 8), np.uint8), x_test=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(BidmError, match="x_train, x_test, several that can be images"):
        open_data(make_teacher(), DataOptions("x.npz"), ConditionSet())


def test_images_in_a_npy():
    np.save("x.npy", np.full((3, 8, 8), 255, np.uint8))
    data = open_data(make_teacher(), DataOptions("x.npy"), ConditionSet())
    assert isinstance(data, ImageData) and data.batch(torch.tensor([2]), torch.Generator())[0].min() == 1


def test_floats_from_0_to_255_reach_the_network_in_one():
    values = np.random.default_rng(0).uniform(0, 255, (4, 1, 8, 8)).astype(np.float32)
    np.save("x.npy", values)
    x0, _ = LatentData(make_teacher(), "x.npy").batch(torch.arange(4), torch.Generator())
    assert torch.allclose(x0, torch.from_numpy(values) / 127.5 - 1, atol=1e-5)
