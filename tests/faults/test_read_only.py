"""Read-only folders: one line before any work, or none at all where nothing has to be written."""

from __future__ import annotations

import subprocess

import pytest

from tests.cli.running import DEMO

DIGITS = (DEMO / "digits.pth", "--recipe", DEMO / "digits-w1a1.yaml", "--data", DEMO / "digits.npz")
FACES = DEMO / "faces-w1a1.bidm"
COMMANDS = {
    "compress -o": ("compress", *DIGITS, "-o", "{}/x.bidm"),
    "compress -o, a folder to be made": ("compress", *DIGITS, "-o", "{}/new/folder/x.bidm"),
    "compress --run-dir": ("compress", *DIGITS, "--run-dir", "{}/run"),
    "sample --out": ("sample", FACES, "-n", 1, "--steps", 1, "--out", "{}/samples"),
    "report --html": ("report", FACES, "--html", "{}/page.html"),
    "report --json": ("report", FACES, "--json", "{}/report.json"),
    "inspect --json": ("inspect", FACES, "--json", "{}/inspect.json"),
    "export": ("export", FACES, "-o", "{}/x.ckpt"),
    "demo": ("demo", "{}/demo"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder_is_one_line_before_any_work(command, runner, read_only, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    line = runner.fails(*(str(word).format(read_only) for word in COMMANDS[command]))
    assert "ead-only" in line or "Permission denied" in line, line
    assert str(read_only) in line and "choose another" in line and "free some space" not in line, line
    assert list(here.iterdir()) == []


def test_a_complete_sample_folder_needs_no_writing(runner, small_disk):
    folder = small_disk(1 << 20)
    command = ("sample", FACES, "-n", 1, "--steps", 1, "--out", folder / "samples")
    assert runner(*command).status == 0
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    ran = runner(*command)
    assert ran.status == 0 and "Already complete" in ran.out, ran.err


def test_a_read_only_cache_is_done_without(runner, read_only, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only))
    monkeypatch.setenv("BIDM_LATENTS_GIB", "1")
    ran = runner("compress", *DIGITS, "--steps", 1, "--batch-size", 2, "--no-trajectory", "-o", "x.bidm")
    assert ran.status == 0, ran.err
