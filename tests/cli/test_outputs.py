"""Existing files that bidm did not write are not replaced without a word."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bidm_cli.checkpoints.export import export_checkpoint
from bidm_cli.distill.runs import choose_run_dir
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.read import load_packed
from tests.cli.running import DEMO, Runner
from tests.report.models import packed_of, tiny


@pytest.fixture
def bidm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    monkeypatch.chdir(tmp_path)
    packed_of(tiny(), tmp_path / "m.bidm")
    return Runner(monkeypatch, capsys)


@pytest.mark.parametrize("taken", ["out.pth", "out.yml", "out.yaml", "out.json"])
def test_export_leaves_a_checkpoint_and_its_configuration_alone(bidm: Runner, taken: str) -> None:
    Path(taken).write_text("an original")
    line = bidm.fails("export", "m.bidm", "-o", "out.pth")
    assert taken in line and "--overwrite" in line
    assert Path(taken).read_text() == "an original" and len(list(Path().glob("out*"))) == 1
    assert bidm("export", "m.bidm", "-o", "out.pth", "--overwrite").status == 0
    assert Path("out.pth").stat().st_size > 1000


def test_export_never_replaces_the_packed_file(bidm: Runner) -> None:
    before = Path("m.bidm").read_bytes()
    Path("link.pth").symlink_to("m.bidm")
    for name in ("m.bidm", "link.pth"):
        assert "the packed file itself" in bidm.fails("export", "m.bidm", "-o", name, "--overwrite")
    assert Path("m.bidm").read_bytes() == before


def test_export_to_an_empty_file_or_a_new_folder(bidm: Runner) -> None:
    Path("out.pth").touch()
    assert bidm("export", "m.bidm", "-o", "out.pth").status == 0
    assert bidm("export", "m.bidm", "-o", "new/out.pth").status == 0
    with pytest.raises(BidmError, match=r"out\.pth exists.*`overwrite`"):
        export_checkpoint(load_packed("m.bidm"), "out.pth")


def test_a_full_folder_is_no_place_for_a_diffusers_model(
    bidm: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load_packed("m.bidm")
    packed.family = "diffusers"
    Path("original").mkdir()
    Path("original/model_index.json").write_text("{}")
    with pytest.raises(BidmError, match="original exists"):
        export_checkpoint(packed, "original")


WRITERS = {"inspect": ("--json",), "report": ("--json", "--html"), "bench": ("--json",)}


@pytest.mark.parametrize(("command", "option"), [(c, option) for c in WRITERS for option in WRITERS[c]])
def test_json_and_pages_replace_only_their_own_kind(bidm: Runner, command: str, option: str) -> None:
    foreign = {
        "config.json": '{"_class_name": "UNet2DModel"}',
        "list.json": "[1]",
        "x.txt": "x",
        "y.html": "<html>",
    }
    for name, content in foreign.items():
        Path(name).write_text(content)
    for name in (*foreign, "m.bidm"):
        before = Path(name).read_bytes()
        line = bidm.fails(command, "m.bidm", option, name)
        assert option in line and name in line and "another name" in line
        assert Path(name).read_bytes() == before
    quick = ("--rounds", 1, "--steps", 0, "--no-layers", "--no-memory") if command == "bench" else ()
    Path("own").touch()
    for _ in range(2):
        assert bidm(command, "m.bidm", option, "own", *quick).status == 0
    assert Path("own").stat().st_size > 0


def test_statistics_replace_statistics_alone(bidm: Runner) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.savez("images.npz", images=images)
    before = Path("images.npz").read_bytes()
    line = bidm.fails("report", "--reference", "images.npz", "--save-stats", "images.npz")
    assert "--save-stats images.npz" in line and "another name" in line
    assert Path("images.npz").read_bytes() == before
    for _ in range(2):
        ran = bidm(
            "report", "--reference", "images.npz", "--save-stats", "s.npz", "--features", "efficientnet-lite0"
        )
        assert ran.status == 0, ran.err
    with np.load("s.npz") as saved:
        assert saved["mu"].shape == (1280,) and saved["sigma"].shape == (1280, 1280)


def test_compress_replaces_packed_files_alone(bidm: Runner) -> None:
    Path("model.ckpt").write_text("an original")
    arguments = ("compress", DEMO / "digits.pth", "--data", DEMO / "digits.npz", "--steps", 0)
    assert "not a packed file" in bidm.fails(*arguments, "-o", "model.ckpt")
    Path("training").mkdir()
    Path("training/checkpoint.pt").write_text("another program's")
    assert "holds checkpoint.pt" in bidm.fails(*arguments, "--run-dir", "training")
    assert "holds checkpoint.pt" in bidm.fails(*arguments, "--run-dir", "training", "--resume")
    assert Path("training/checkpoint.pt").read_text() == "another program's"
    assert [path.name for path in Path("training").iterdir()] == ["checkpoint.pt"]


def test_a_folder_of_an_interrupted_or_refused_run_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"settings": {}, "weights": {}}))
    (tmp_path / "notes.txt").touch()
    assert choose_run_dir("m", "w1a1", tmp_path, False) == tmp_path
    (tmp_path / "model.json").write_text(json.dumps({"_class_name": "x"}))
    with pytest.raises(BidmError, match=r"holds model\.json.*`run_dir`"):
        choose_run_dir("m", "w1a1", tmp_path, False)


@pytest.mark.parametrize("name", ["grid.png", "samples.npz", "samples.npy", "000000.png"])
def test_sample_leaves_arrays_and_grids_of_others_alone(bidm: Runner, name: str) -> None:
    Path("mine").mkdir()
    np.savez("mine/x.npz", np.zeros(3))
    Path("mine/x.npz").rename(f"mine/{name}")
    before = Path(f"mine/{name}").read_bytes()
    draw = ("sample", "m.bidm", "-n", 1, "--steps", 1, "--out", "mine")
    line = bidm.fails(*draw)
    assert name in line and "--overwrite" in line and Path(f"mine/{name}").read_bytes() == before
    assert bidm(*draw, "--overwrite").status == 0
