"""compress, sample, report on networks conditioned on contexts, images, masks and segmentation maps."""

from __future__ import annotations

import json
import os
import shutil
import sys

import numpy as np
import pytest

from tests.end_to_end.conditioned import CHANNELS, KINDS, SAMPLING, checkpoint, inputs

QUICK = """
name: quick
layers:
  - {role: [stem, head, time_embedding], keep: float}
  - {role: [conv, skip, resample], binarize: {}}
  - {role: "*", binarize: {activation_scale: none, shortcut: none}}
tbs: {connect: "decoder[-8:]"}
train: {synthetic_steps: 3}
sampler: {steps: 3}
"""


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory):
    """(kind, packed file, its original, the options that name its conditions)."""
    from bidm_cli.cli.main import main

    work = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    original, options = checkpoint(request.param, work / "original"), inputs(request.param, work / "inputs")
    null = ["--unconditional-context", str(work / "inputs" / "none.npy")] if "--context" in options else []
    here, argv = os.getcwd(), sys.argv
    os.chdir(work)
    try:
        (work / "quick.yaml").write_text(QUICK)
        sys.argv = [
            "bidm",
            "compress",
            str(original),
            "--recipe",
            "quick.yaml",
            "--synthetic",
            "--steps",
            "2",
        ]
        sys.argv += ["--batch-size", "2", "--run-dir", "run", "-o", "alone/x.bidm", *options, *null]
        main()
    finally:
        os.chdir(here)
        sys.argv = argv
    return request.param, work / "alone" / "x.bidm", original, options


def test_samples_without_the_original(packed, bidm, tmp_path):
    kind, file, original, options = packed
    hidden = original.with_name("hidden")
    shutil.move(original, hidden)
    try:
        more = [*(["--guidance", "3"] if "--context" in options else []), *SAMPLING.get(kind, [])]
        out = tmp_path / "s"
        called = bidm("sample", file, "-n", 2, "--steps", 3, "--raw", "--out", out, *options, *more)
    finally:
        shutil.move(hidden, original)
    assert called.code == 0, called.err
    drawn = np.load(tmp_path / "s" / "samples.npy")
    channels = CHANNELS.get(kind, 4)
    assert drawn.shape == (2, channels, 8, 8) and np.isfinite(drawn).all()


def test_the_original_samples_with_the_same_options(packed, bidm, tmp_path):
    kind, _, original, options = packed
    more = ("--raw", "--out", tmp_path / "s", *SAMPLING.get(kind, []))
    called = bidm("sample", original, "-n", 2, "--steps", 3, *more, *options)
    assert called.code == 0, called.err


def test_reports_and_measures_the_trajectory_anew(packed, bidm, tmp_path):
    _, file, original, options = packed
    called = bidm("report", file, "--teacher", original, "--json", tmp_path / "r.json", *options)
    assert called.code == 0, called.err
    model = json.loads((tmp_path / "r.json").read_text())["models"][0]
    assert model["cost"]["storage_ratio"] > 3
    assert model["trajectory_error"]["n"] >= 2 and "computed now" in called.out
    called = bidm("report", file, "--teacher", original)
    assert called.code == 0 and "not measured anew" in called.out


def test_inspect_names_the_options(packed, bidm):
    _, file, original, options = packed
    for path in (file, original):
        called = bidm("inspect", path)
        line = next(line for line in called.out.splitlines() if line.startswith("  classes"))
        for option in ("--context", "--condition"):
            assert (option in line) == (option in options)


def test_exported_it_takes_the_same_conditions(packed, bidm, tmp_path):
    kind, file, _, options = packed
    if kind in ("openai", "diffusers"):
        pytest.skip("bidm export writes ldm and ddpm")
    assert bidm("export", file, "-o", tmp_path / "back.ckpt").code == 0
    more = ("-n", 1, "--steps", 2, "--raw", "--out", tmp_path / "s", *SAMPLING.get(kind, []))
    called = bidm("sample", tmp_path / "back.ckpt", *more, *options)
    assert called.code == 0, called.err


def test_what_is_missing_is_one_line(packed, bidm, tmp_path):
    _, file, _, options = packed
    for command in (("sample", file, "--raw", "--out", tmp_path / "s"), ("sample", file, "--raw")):
        called = bidm(*command)
        lines = called.err.strip().splitlines()
        assert called.code == 1 and len(lines) == 1, called.err
        assert "--context" in lines[0] or "--condition" in lines[0]
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((2, 5, 23), np.float32))
    option = "--context" if "--context" in options else "--condition"
    called = bidm("sample", file, "--raw", *options, option, wrong)
    assert called.code == 1 and "[2, 5, 23]" in called.err and "this model takes" in called.err
    assert len(called.err.strip().splitlines()) == 1
