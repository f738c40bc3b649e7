"""What was assumed about a checkpoint: said by every command, kept with what is made, refused by --strict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from bidm_cli.checkpoints.evidence import (
    Note,
    assumed,
    caveat_lines,
    caveats_json,
    left_out,
    settled,
    unreadable,
)
from bidm_cli.checkpoints.open import load_checkpoint, open_model
from bidm_cli.distill.compress import compress
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.progress import Pace, Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.report.inspection import Inspection
from bidm_cli.report.opening import opening
from bidm_cli.report.pages.summary import summarize
from tests.cli.running import DEMO, Runner
from tests.report.models import packed_of, tiny


@pytest.fixture
def bidm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The digits without their configuration: size and schedule are not known."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    shutil.copy(DEMO / "digits.pth", tmp_path / "models" / "bare.pth")
    return Path("models") / "bare.pth"


SIZE = ("--set", "image_size=8")
SCHEDULE = "schedule: linear, T=1000, 0.0001 to 0.02 (assumed"


def run_of(checkpoint: Path, *more: object) -> tuple[object, ...]:
    recipe = DEMO / "digits-w1a1.yaml"
    return ("compress", checkpoint, *SIZE, "--recipe", recipe, "--data", DEMO / "digits.npz", *more)


def test_from_compress_to_the_report_of_the_packed_file(bidm: Runner, bare: Path) -> None:
    ran = bidm(*run_of(bare, "--steps", 13, "--batch-size", 2))
    assert ran.status == 0, ran.err
    head = ran.out.partition("\n  step ")[0].splitlines()
    assert len(head) <= 14 and head[0] == "models/bare.pth: family ddpm"
    whole = "\n".join(head)
    for words in (
        "701,345 parameters", "1x8x8, predicts epsilon", "linear, 1000 timesteps", "47 of 51 layers",
        "digits.npz", "13 steps of 2 by adamw", "seed 0", "float32 on cpu", "bare.bidm", "runs/bare-w1a1-1",
        f"Assumed: {SCHEDULE}", "--set beta_schedule",
    ):  # fmt: skip
        assert words in whole, words
    assert "size 32x32" not in whole, "given by the user"
    assert "more steps of" in ran.out
    run = Path("runs/bare-w1a1-1")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["train"]["steps"], recipe["train"]["batch_size"]) == (13, 2) and recipe["layers"]
    (kept,) = json.loads((run / "model.json").read_text())["caveats"]
    assert kept["kind"] == "assumed" and kept["text"].startswith(SCHEDULE)
    metadata, _ = read_packed("bare.bidm")
    assert metadata["caveats"] == [kept]

    once = "Assumed when it was compressed: " + SCHEDULE
    first, again, more = (bidm("sample", "bare.bidm", "-n", n, "--steps", 2) for n in (1, 1, 2))
    assert once in first.out and once not in again.out + more.out and first.status == 0
    reported = bidm("report", "bare.bidm", "--json", "r.json", "--html", "r.html")
    assert once in reported.out and once in Path("r.html").read_text()
    assert "--set beta_schedule" in Path("r.html").read_text()
    assert once in json.loads(Path("r.json").read_text())["models"][0]["caveats"][0]
    inspected = bidm("inspect", "bare.bidm", "--json", "i.json")
    assert f"  assumed      {SCHEDULE}" in inspected.out
    assert json.loads(Path("i.json").read_text())["caveats"][0]["kind"] == "assumed"
    assert once in bidm("export", "bare.bidm", "-o", "float.pth").out
    for command in (("sample", "bare.bidm"), ("report", "bare.bidm"), ("inspect", "bare.bidm")):
        assert "compress the original again" in bidm.fails(*command, "--strict")


def test_originals_say_it_once_per_folder(bidm: Runner, bare: Path) -> None:
    draw = ("sample", bare, *SIZE, "--steps", 1)
    first, again = bidm(*draw, "-n", 1), bidm(*draw, "-n", 2)
    assert f"Assumed: {SCHEDULE}" in first.out and "Assumed" not in again.out
    assert f"Assumed: {SCHEDULE}" in bidm(*draw, "-n", 1, "--overwrite").out
    assert f"Assumed: {SCHEDULE}" in bidm("report", bare).out


def test_a_teacher_of_a_report_says_it_too(bidm: Runner, bare: Path, tmp_path: Path) -> None:
    packed_of(tiny(), tmp_path / "m.bidm")
    ran = bidm("report", "m.bidm", "--teacher", bare, *SIZE)
    assert f"models/bare.pth: Assumed: {SCHEDULE}" in ran.out, ran.err
    assert "(1) schedule" in bidm.fails("report", "m.bidm", "--teacher", bare, *SIZE, "--strict")


def test_strict_lists_what_is_assumed_and_writes_nothing(bidm: Runner, bare: Path, tmp_path: Path) -> None:
    commands = (
        ("compress", bare),
        ("compress", bare, "--dry-run"),
        ("sample", bare),
        ("report", bare),
        ("inspect", bare),
    )
    for command in commands:
        line = bidm.fails(*command, "--strict")
        assert "(1) size 32x32" in line and "(2) schedule" in line and "--set or --config" in line
        assert "(1) schedule" in bidm.fails(*command, "--strict", *SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    given = ("--strict", *SIZE, "--set", "timesteps=1000")
    assert bidm("inspect", bare, *given).status == 0
    assert bidm("inspect", DEMO / "digits.pth", "--strict").status == 0
    shutil.copy(DEMO / "digits.yml", bare.with_suffix(".yml"))
    assert bidm("inspect", bare, "--strict").status == 0


def test_strict_in_the_library(bare: Path, tmp_path: Path) -> None:
    for opener in (load_checkpoint, open_model):
        with pytest.raises(BidmError, match=r"`strict`.*\(1\) size 32x32.*`settings` image_size"):
            opener(bare, strict=True)
        opener(bare, strict=True, settings={"image_size": 8, "beta_end": 0.02})
    config = tmp_path / "c.json"
    config.write_text(
        json.dumps(
            {
                "ch": 32,
                "ch_mult": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "resolution": 8,
                "out_ch": 1,
                "in_channels": 1,
                "dropout": 0.0,
            }
        )
    )
    open_model(config)
    with pytest.raises(BidmError, match=r"\(1\) beta_schedule.*\(2\) ancestral"):
        open_model(config, strict=True)


def test_all_kinds_of_notes_are_kept_and_only_left_out_passes_strict(tmp_path: Path, bare: Path) -> None:
    model = load_checkpoint(DEMO / "digits.pth")
    model.source = tmp_path / "models" / "bare.pth"
    notes = (
        left_out(f"{tmp_path}/models/config.yml says `loss_type`, which bidm does not need"),
        unreadable(f"{tmp_path}/models/scheduler.json: not JSON"),
        assumed("predicts noise (assumed; override with `settings` prediction=v)"),
    )
    model.evidence += notes
    said: list[str] = []
    reporter = Reporter(begin=lambda run: said.extend(opening(run).splitlines()))
    compress(model, Recipe.load("w1a1"), "x.bidm", data=DEMO / "digits.npz", steps=1, reporter=reporter)
    assert said[-3:] == [f"Left out: {notes[0]}", f"Not readable: {notes[1]}", f"Assumed: {notes[2]}"]
    packed = load_packed("x.bidm")
    assert [record["kind"] for record in packed.caveats] == ["left out", "unreadable", "assumed"]
    assert packed.caveats[1]["text"] == "scheduler.json: not JSON", "names of folders are nobody's business"
    text = Inspection.of(packed, Path("x.bidm")).to_text()
    for words in (
        "  left out     config.yml says",
        "  not readable scheduler.json",
        "  assumed      predicts noise",
    ):
        assert words in text
    assert summarize(packed, Path("x.bidm")).caveats == caveat_lines(packed)
    with pytest.raises(BidmError, match=r"2 assumed or not readable.*\(1\) scheduler.json.*\(2\) predicts"):
        open_model("x.bidm", strict=True)
    model.evidence = [notes[0]]
    compress(model, Recipe.load("w1a1"), "y.bidm", data=DEMO / "digits.npz", steps=1)
    open_model("y.bidm", strict=True)


def test_a_file_without_caveats_has_no_such_key_and_nonsense_is_refused(tmp_path: Path) -> None:
    packed = packed_of(tiny(), tmp_path / "m.bidm")
    metadata, tensors = read_packed(tmp_path / "m.bidm")
    assert "caveats" not in metadata and packed.caveats == [] and caveat_lines(packed) == []
    for nonsense in (7, [7], ["x"], [{"kind": "assumed"}], {"kind": "assumed", "text": "x"}):
        write_packed(tmp_path / "n.bidm", {**metadata, "caveats": nonsense}, tensors)
        with pytest.raises(BidmError, match=r"n\.bidm"):
            load_packed(tmp_path / "n.bidm")
    later = [{"kind": "guessed", "text": "a\x1b[31mb\nc", "more": 1}]
    write_packed(tmp_path / "n.bidm", {**metadata, "caveats": later}, tensors)
    assert caveat_lines(load_packed(tmp_path / "n.bidm")) == ["guessed when it was compressed: a[31mbc"]


def test_a_setting_settles_the_assumptions_that_name_it() -> None:
    notes = [
        assumed("heads (assumed; override with `config` or `settings` num_heads=N, use_new_order=true)"),
        assumed("schedule (assumed; override with `settings` beta_schedule=..., beta_start, timesteps)"),
        left_out("beta_start is left out (`settings` beta_start)"),
        "family x",
    ]

    def kinds(*given: str) -> list[str]:
        return [getattr(note, "kind", "read") for note in settled(notes, given)]

    assert kinds() == kinds("image_size") == ["assumed", "assumed", "left out", "read"]
    assert kinds("num_heads") == ["read", "assumed", "left out", "read"]
    assert kinds("timesteps", "use_new_order") == ["read", "read", "left out", "read"]
    assert settled(notes, ["num_heads"]) == notes, "the texts stay"


def test_folders_of_any_spelling_are_taken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Opened:
        def __init__(self, source: str, *texts: str) -> None:
            self.source, self.evidence = Path(source), [Note(text, "unreadable") for text in texts]

    def texts(*words: str) -> list[str]:
        return [record["text"] for record in caveats_json(Opened(*words))]

    assert texts("sd/unet", "sd/unet/config.json: x", f"{tmp_path}/sd/scheduler") == [
        "config.json: x",
        "scheduler",
    ]
    assert texts("m.pt", f"{tmp_path}/m.yml", "./m.yml", "a/b.yml") == ["m.yml", "./m.yml", "a/b.yml"]


def test_the_pace_is_told_once_after_ten_steps() -> None:
    told: list[tuple[float, int]] = []
    for total, expected in ((11, 0), (12, 1), (40, 1)):
        told.clear()
        pace = Pace(total, lambda seconds, left: told.append((seconds, left)))
        for _ in range(total):
            pace.advance()
        assert len(told) == expected
    assert told[0][1] == 29 and told[0][0] >= 0
