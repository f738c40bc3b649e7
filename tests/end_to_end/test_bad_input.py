"""Bad input: one clear line, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile

import pytest


def assert_refused(called, *words: str, code: int = 1) -> None:
    assert called.code == code, (called.out, called.err)
    lines = [line for line in called.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: "), called.err
    for word in words:
        assert word in lines[0]


@pytest.fixture
def digits(bidm, tmp_path, monkeypatch):
    """A folder with the bundled files, which is also the working folder."""
    monkeypatch.chdir(tmp_path)
    assert bidm("demo", "demo").code == 0
    return tmp_path / "demo"


@pytest.fixture
def packed(bidm, digits):
    """digits.bidm, barely trained."""
    called = bidm(
        "compress", digits / "digits.pth", "--recipe", digits / "digits-w1a1.yaml",
        "--data", digits / "digits.npz", "--steps", 1, "-o", "digits.bidm", "--run-dir", "run",
    )  # fmt: skip
    assert called.code == 0, called.err
    return digits.parent / "digits.bidm"


class Writes:
    """Unpickling this would write a file."""

    def __init__(self, target) -> None:
        self.target = str(target)

    def __reduce__(self):
        return exec, (f"open({self.target!r}, 'w').write('x')",)


@pytest.mark.parametrize("container", ["plain", "zip"])
def test_a_malicious_pickle_is_refused_by_name_and_writes_nothing(bidm, tmp_path, monkeypatch, container):
    monkeypatch.chdir(tmp_path)
    target, file = tmp_path / "owned", tmp_path / "model.ckpt"
    payload = pickle.dumps({"state_dict": Writes(target)})
    if container == "plain":
        file.write_bytes(payload)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    before = set(tmp_path.iterdir())
    for command in ("inspect", "compress", "sample"):
        assert_refused(bidm(command, file), "model.ckpt", "exec" if container == "zip" else "")
    assert not target.exists() and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kept", [0, 10, 1000, 100_000])
def test_a_truncated_checkpoint(bidm, digits, kept):
    file = digits / "digits.pth"
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(bidm("compress", file, "-o", "x.bidm"), "digits.pth")
    assert not (digits.parent / "x.bidm").exists() and not (digits.parent / "runs").exists()


def test_a_truncated_or_changed_packed_file(bidm, packed):
    whole = packed.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for content in (whole[:5], whole[: header // 2], whole[:-1], whole + b"x"):
        packed.write_bytes(content)
        assert_refused(bidm("sample", packed, "-n", 1, "--out", "s"), "digits.bidm")
    for place in range(0, header, max(1, header // 25)):
        changed = bytearray(whole)
        changed[8 + place] ^= 1
        packed.write_bytes(bytes(changed))
        assert_refused(bidm("sample", packed, "-n", 1, "--out", "s"), "digits.bidm")
    assert not (packed.parent / "s").exists()


def test_a_recipe_with_a_typo(bidm, digits):
    recipe = digits / "my.yaml"
    recipe.write_text((digits / "digits-w1a1.yaml").read_text().replace("threshold:", "treshold:", 1))
    called = bidm("compress", digits / "digits.pth", "--recipe", recipe)
    assert_refused(called, "my.yaml, line 6", "treshold", "threshold")
    assert not (digits.parent / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "nothing.bidm"),
        ("inspect", "nothing.ckpt"),
        ("compress", "nothing.ckpt"),
        ("report", "nothing.bidm"),
        ("export", "nothing.bidm", "-o", "x.ckpt"),
        ("bench", "nothing.bidm"),
    ],
)
def test_a_missing_file(bidm, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert_refused(bidm(*arguments), "nothing")
    assert not list(tmp_path.iterdir())


def test_missing_data_leaves_no_output(bidm, digits):
    called = bidm("compress", digits / "digits.pth", "--data", "nowhere", "-o", "x.bidm")
    assert_refused(called, "nowhere")
    assert not (digits.parent / "x.bidm").exists()


def test_usage_errors_exit_with_two(bidm, digits):
    called = bidm("compress", digits / "digits.pth", "--data", "x", "--synthetic")
    assert called.code == 2 and "exclude each other" in called.err
    assert bidm("sample").code == 2
    assert bidm("smaple").code == 2


def test_debug_shows_the_traceback(digits):
    code = "from bidm_cli.cli.main import main; main()"
    command = [sys.executable, "-c", code, "--debug", "inspect", "no"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=digits)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tmpfs")
def test_a_full_target_folder(bidm, packed, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        (full / "filler").write_bytes(b"\0" * 60 * 1024)
        assert_refused(bidm("export", packed, "-o", full / "back.pth"), "full")
        assert_refused(bidm("sample", packed, "-n", 4, "--steps", 1, "--out", full / "s"), "full")
        called = bidm(
            "compress", "demo/digits.pth", "--data", "demo/digits.npz", "--steps", 1, "--batch-size", 2,
            "-o", full / "x.bidm", "--run-dir", "run2",
        )  # fmt: skip
        assert_refused(called, "x.bidm")
        left = [p.name for p in full.rglob("*") if p.is_file() and p.name != "filler"]
        assert not [name for name in left if not name.endswith((".png", ".json"))], left
    finally:
        subprocess.run(["umount", "--lazy", full], check=True)
