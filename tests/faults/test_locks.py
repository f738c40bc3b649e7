"""Two runs into one folder: the second is refused; a killed one leaves no lock."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from bidm_cli import locks
from bidm_cli.distill.compress import compress
from bidm_cli.errors import BidmError
from bidm_cli.locks import LOCK, FolderInUse, folder_lock
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.folder import SampleFolder
from tests.distill.conftest import TINY, images, make_teacher  # noqa: F401


def train(folder: Path, data: Path, begin=lambda plan: None, **more):
    options = {"data": data, "trajectory_points": 0, **more}
    return compress(
        make_teacher(), Recipe.parse(TINY), folder / "x.bidm", reporter=Reporter(begin=begin), **options
    )


def test_a_second_run_into_the_folder_is_refused_and_the_first_ends_well(images, tmp_path):  # noqa: F811
    refused: list[str] = []

    def begin(plan):
        with pytest.raises(FolderInUse) as error:
            train(tmp_path, images, run_dir=tmp_path / "run", resume=True)
        refused.append(str(error.value))

    train(tmp_path, images, begin, run_dir=tmp_path / "run")
    assert f"is being written to by process {os.getpid()}" in refused[0] and "`run_dir`" in refused[0]
    assert (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / LOCK).exists()


def test_two_runs_begun_at_once_without_a_folder_get_one_each(images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    train(tmp_path, images, begin=lambda plan: train(tmp_path, images))
    assert sorted(path.parent.name for path in tmp_path.glob("runs/*/result.json")) == [
        "model-tiny-1",
        "model-tiny-2",
    ]


def test_a_run_that_is_refused_leaves_no_folder(images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BidmError, match="optimizer"):
        compress(
            make_teacher(), Recipe.parse(TINY).override("train", optimizer="adamx"), "x.bidm", data=images
        )
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


def test_a_second_drawing_into_the_folder_is_refused_and_removes_nothing_of_the_first(tmp_path):
    temporary = tmp_path / ".000001.12345678.png"
    with folder_lock(tmp_path, "wait"):
        temporary.touch()
        for overwrite in (False, True):
            with pytest.raises(FolderInUse, match="choose another `out`"):
                SampleFolder(tmp_path, {}, 3, overwrite=overwrite)
        assert temporary.exists()
    SampleFolder(tmp_path, {}, 3)
    assert not temporary.exists()


def _hold(folder, held) -> None:
    with folder_lock(folder, "wait"):
        held.set()
        held.wait()
        multiprocessing.Event().wait()


def test_a_killed_process_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(FolderInUse, match=f"process {process.pid} on"), folder_lock(tmp_path, "wait"):
        pass
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()
    with folder_lock(tmp_path, "wait"):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_between_opening_and_locking_is_taken_anew(tmp_path, monkeypatch):
    lock, removed = locks.lock, []

    def late(file, say):
        if not removed:
            removed.append(os.remove(tmp_path / LOCK))
        lock(file, say)

    monkeypatch.setattr(locks, "lock", late)
    with folder_lock(tmp_path, "wait"), pytest.raises(FolderInUse), folder_lock(tmp_path, "wait"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_used(number, tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    said: list[str] = []
    with folder_lock(tmp_path, "wait", said.append):
        pass
    assert len(said) == 1 and "cannot be locked" in said[0]


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with folder_lock(tmp_path / "a" / "b", "wait"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path / "a", "wait"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    with pytest.raises(BidmError, match="cannot write to"), folder_lock(tmp_path / "a" / "kept", "wait"):
        pass
