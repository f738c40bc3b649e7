"""Temporary files of killed processes: the next write of the same file removes them, and no others."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from bidm_cli import files, locks
from bidm_cli.checkpoints.exporting import write_checkpoint
from bidm_cli.files import remove_leftovers, write_atomically
from bidm_cli.report.metrics.saved import save_statistics
from bidm_cli.report.pages.render import write_json
from bidm_cli.sampling.images import write_png
from cupy_kernels import compiler
from tests.faults.test_full_disk import packed


def _stop_half_way(path, written) -> None:
    with write_atomically(path) as temporary:
        temporary.write_bytes(b"half")
        written.set()
        signal.pause()


@pytest.fixture
def writer(tmp_path):
    """A process that has written half of m.bidm, and waits."""
    context = multiprocessing.get_context("fork")
    written = context.Event()
    process = context.Process(target=_stop_half_way, args=(tmp_path / "m.bidm", written))
    process.start()
    assert written.wait(60)
    yield process
    process.kill()
    process.join()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_write_removes_what_a_killed_process_left_of_the_same_file_and_nothing_of_a_living_one(
    writer, tmp_path
):
    (temporary,) = names(tmp_path)
    packed(tmp_path / "m.bidm", 1)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"m.bidm", temporary}
    writer.kill()
    writer.join()
    packed(tmp_path / "other.bidm", 1)
    assert temporary in names(tmp_path)
    packed(tmp_path / "m.bidm", 2)
    assert names(tmp_path) == {"m.bidm", "other.bidm"}


OTHERS = (".m2.12345678.bidm", ".m.12345678.ckpt", ".m.1234567.bidm", ".m.1234567G.bidm", "m.12345678.bidm")


@pytest.mark.parametrize("name", ["m.bidm", "m"])
def test_files_that_only_look_alike_stay(name, tmp_path):
    left = ".m.12345678" + name[1:]
    for one in (*OTHERS, left):
        (tmp_path / one).touch()
    (tmp_path / f".m.00000000{name[1:]}").mkdir()
    (tmp_path / f".m.00000001{name[1:]}").symlink_to(tmp_path / OTHERS[0])
    before = names(tmp_path)
    packed(tmp_path / name, 1)
    assert names(tmp_path) == before - {left} | {name}


WRITERS = {
    "x.json": lambda path: write_json(path, {}),
    "x.npz": lambda path: save_statistics(path, np.zeros(2), np.eye(2)),
    "x.ckpt": lambda path: write_checkpoint(path, {}, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_that_is_asked_for_is_written_so(name, tmp_path):
    (tmp_path / f".x.0123abcd.{name[2:]}").touch()
    WRITERS[name](tmp_path / name)
    assert not [one for one in names(tmp_path) if one.startswith(".")]


def test_one_of_many_files_is_written_without_a_listing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "remove_leftovers", lambda *folder: pytest.fail("listed"))
    write_png(tmp_path / "000000.png", np.zeros((2, 2, 3), np.uint8))


def test_a_temporary_that_was_cleared_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    lock, cleared = files.lock, []

    def late(file, say):
        if not cleared:
            cleared.append(os.remove(file.name))
        lock(file, say)

    monkeypatch.setattr(files, "lock", late)
    with write_atomically(tmp_path / "m.bidm") as temporary:
        assert temporary.exists()
        remove_leftovers(tmp_path)
        temporary.write_bytes(b"whole")
    assert cleared and names(tmp_path) == {"m.bidm"} and (tmp_path / "m.bidm").read_bytes() == b"whole"


def test_without_locks_only_a_folder_of_this_process_alone_is_cleared(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    (tmp_path / ".m.12345678.bidm").touch()
    packed(tmp_path / "m.bidm", 1)
    assert names(tmp_path) == {"m.bidm", ".m.12345678.bidm"}
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"m.bidm"}


def test_compiled_gpu_kernels_are_kept_whole_and_old_leftovers_removed(tmp_path, monkeypatch):
    old, new = tmp_path / "kernel-0.12345678", tmp_path / "kernel-0.12345679"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, time.time() - 2 * compiler.LEFT_AFTER_SECONDS))
    compiler._keep(tmp_path / "kernel-0.cubin", b"code")
    assert names(tmp_path) == {new.name, "kernel-0.cubin"}

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiler.os, "replace", full)
    with pytest.raises(OSError):
        compiler._keep(tmp_path / "kernel-1.cubin", b"code")
    assert names(tmp_path) == {new.name, "kernel-0.cubin"}
