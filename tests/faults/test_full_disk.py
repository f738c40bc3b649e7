"""A full disk: one line, what was there stays, and the same command goes on once there is room."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import write_packed
from bidm_cli.sampling.images import write_npy, write_npz, write_png
from tests.faults.conftest import files_up_to
from tests.faults.kills import words_of
from tests.faults.processes import Started, done
from tests.faults.work import WORKS, content, leftovers

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


def packed(path, seed):
    tensors = {"unet.x": torch.full((4000,), float(seed))}
    write_packed(path, {"layers": [], "connections": None, "seed": seed}, tensors)


WRITERS = {
    "image.png": lambda path, seed: write_png(path, PIXELS[seed]),
    "samples.npz": lambda path, seed: write_npz(path, PIXELS + seed, [1, 2, 3, 4]),
    "samples.npy": lambda path, seed: write_npy(path, PIXELS + seed),
    "model.bidm": packed,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_at_any_byte_leaves_the_file_that_was_there(name, tmp_path):
    write, path = WRITERS[name], tmp_path / name
    write(path, 0)
    before = path.read_bytes()
    for limit in range(0, len(before), max(1, len(before) // 25)):
        with files_up_to(limit), pytest.raises(BidmError, match=f"cannot write .*{name}.*free some space"):
            write(path, 1)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write(path, 1)
    assert path.read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
@pytest.mark.parametrize("share", [0.15, 0.45, 0.8])
def test_work_on_a_full_disk_goes_on_with_more_room_to_the_same_bytes(work, share, whole, small_disk):
    used = _size(whole, (*work.results, *work.needs, "run"))
    folder = small_disk(4 * used)
    (folder / "demo").symlink_to(whole / "demo")
    for name in work.needs:
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, folder / name)
    small_disk(_size(folder, work.needs) + int(share * used / 2) + 8192)
    status, printed = Started(work.words, folder).end()
    assert "Traceback" not in printed
    if status:
        errors = [line for line in printed.splitlines() if line.startswith("Error")]
        assert status == 1 and len(errors) == 1 and "cannot write" in errors[0], printed
    small_disk(8 * used)
    done(words_of(work, folder), folder)
    assert content(folder, work) == content(whole, work) and not leftovers(folder)


def _size(folder, names):
    files = [file for name in names for file in [folder / name, *(folder / name).rglob("*")]]
    return sum(file.stat().st_size for file in files if file.is_file())
