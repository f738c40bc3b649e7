import errno
import json
import subprocess

import numpy as np
import pytest

from bidm_cli.errors import BidmError
from bidm_cli.sampling.folder import SampleFolder

SETTINGS = {"model": "abc", "steps": 10, "label": None, "eta": 0.5}


def image(number):
    return np.full((4, 4, 1), number, dtype=np.uint8)


def latent(number):
    return np.full((1, 4, 4), number / 7, dtype=np.float32)


def fill(folder, count=None):
    for number in folder.missing()[:count]:
        folder.add(number, image(number) if folder.images else None, latent(number))


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("raw, npz", [(False, False), (True, True)])
def test_an_interrupted_folder_ends_like_an_uninterrupted_one(tmp_path, raw, npz):
    whole = SampleFolder(tmp_path / "whole", SETTINGS, 5, raw=raw, npz=npz)
    fill(whole)
    whole.finish()
    fill(SampleFolder(tmp_path / "parts", SETTINGS, 5, raw=raw, npz=npz), count=2)
    again = SampleFolder(tmp_path / "parts", SETTINGS, 5, raw=raw, npz=npz)
    assert again.missing() == [2, 3, 4]
    fill(again)
    again.finish()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    expected = {f"{i:06d}.png" for i in range(5)} | {"grid.png", "sample.json"}
    assert set(contents(tmp_path / "whole")) == expected | ({"samples.npy", "samples.npz"} if raw else set())


def test_a_finished_folder_has_nothing_missing_and_can_grow(tmp_path):
    for n, missing in ((3, [0, 1, 2]), (3, []), (6, [3, 4, 5])):
        folder = SampleFolder(tmp_path, SETTINGS, n, raw=n == 3, npz=n == 3)
        assert folder.missing() == missing
        fill(folder)
        folder.finish()
        assert folder.missing() == []
    rows = np.load(tmp_path / "samples.npy")
    assert np.array_equal(rows, np.stack([latent(i) for i in range(6)]))
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == list(range(6))


def test_a_lost_image_is_drawn_again_and_the_summaries_with_it(tmp_path):
    folder = SampleFolder(tmp_path, SETTINGS, 4, raw=True, npz=True)
    fill(folder)
    folder.finish()
    before = contents(tmp_path)
    (tmp_path / "000002.png").unlink()
    folder = SampleFolder(tmp_path, SETTINGS, 4)
    assert folder.missing() == [2]
    fill(folder)
    folder.finish()
    assert contents(tmp_path) == before


def test_asking_for_floats_later_draws_the_images_again(tmp_path):
    folder = SampleFolder(tmp_path, SETTINGS, 3)
    fill(folder)
    folder.finish()
    assert SampleFolder(tmp_path, SETTINGS, 3, raw=True).missing() == [0, 1, 2]


@pytest.mark.parametrize(
    "settings, n, message",
    [
        ({**SETTINGS, "steps": 20}, 3, "steps 10, not 20.*`out`.*`overwrite`"),
        ({**SETTINGS, "label": [1]}, 3, r"label none, not \[1\]"),
        ({**SETTINGS, "model": "other"}, 3, "another model"),
        (SETTINGS, 2, "3 images, more than the 2"),
    ],
)
def test_other_settings_are_refused_until_overwritten(tmp_path, settings, n, message):
    folder = SampleFolder(tmp_path, SETTINGS, 3, raw=True, npz=True)
    fill(folder)
    folder.finish()
    (tmp_path / "mine.txt").write_text("kept")
    before = contents(tmp_path)
    with pytest.raises(BidmError, match=message):
        SampleFolder(tmp_path, settings, n)
    assert contents(tmp_path) == before
    folder = SampleFolder(tmp_path, settings, n, overwrite=True)
    assert folder.missing() == list(range(n)) and not folder.raw
    assert set(contents(tmp_path)) == {"sample.json", "mine.txt"}


def test_images_of_unknown_origin_are_not_touched(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"holiday")
    with pytest.raises(BidmError, match=r"without a sample\.json"):
        SampleFolder(tmp_path, SETTINGS, 3)
    assert contents(tmp_path) == {"000000.png": b"holiday"}


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 3, "n": 1}', "null", "[" * 100000])
def test_a_damaged_record_is_one_clear_error(tmp_path, text):
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(BidmError, match="damaged"):
        SampleFolder(tmp_path, SETTINGS, 3)


def test_a_damaged_array_is_named(tmp_path):
    SampleFolder(tmp_path, SETTINGS, 3, raw=True)
    (tmp_path / "samples.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(BidmError, match=r"samples\.npy"):
        SampleFolder(tmp_path, SETTINGS, 3).missing()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(BidmError, match="is a file"):
        SampleFolder(tmp_path / "out", SETTINGS, 3)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    for name in (".000001.0123abcd.png", ".sample.0123abcd.json"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".hidden.png").write_bytes(b"someone else's")
    SampleFolder(tmp_path, SETTINGS, 3)
    assert set(contents(tmp_path)) == {"sample.json", ".hidden.png"}


def test_floats_alone(tmp_path):
    folder = SampleFolder(tmp_path, SETTINGS, 3, images=False, raw=True, npz=True)
    fill(folder)
    folder.finish()
    assert set(contents(tmp_path)) == {"sample.json", "samples.npy"}
    assert SampleFolder(tmp_path, SETTINGS, 3, images=False, raw=True).missing() == []


def test_a_full_disk_leaves_whole_files_only(tmp_path, monkeypatch):
    folder = SampleFolder(tmp_path, SETTINGS, 3, raw=True)
    fill(folder, count=1)
    before = contents(tmp_path / ".raw")

    def full(path, array, **_):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(BidmError, match=r"No space left.*free some space"):
        fill(folder)
    assert contents(tmp_path / ".raw") == before
    assert json.loads((tmp_path / "sample.json").read_text())["n"] == 3


def test_a_really_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        folder = SampleFolder(tmp_path, SETTINGS, 9)
        noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        with pytest.raises(BidmError, match="No space left"):
            for number in folder.missing():
                folder.add(number, noise, latent(number))
        kept = contents(tmp_path)
        assert kept.keys() == {"sample.json", "000000.png"}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
