"""Folders that are full or read-only, and a small run to train."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bidm_cli.interrupts import SIGNALS
from tests.cli.running import Runner
from tests.faults.processes import usual_signals
from tests.faults.work import prepare


@pytest.fixture(autouse=True)
def signals_that_arrive() -> Iterator[None]:
    """The usual handlers, also where the tests were started with some signals ignored."""
    before = [signal.getsignal(one) for one in SIGNALS]
    usual_signals()
    yield
    for one, handler in zip(SIGNALS, before, strict=True):
        signal.signal(one, handler)


@pytest.fixture
def runner(monkeypatch, capsys) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """Folder with the results of all kinds of work (:mod:`tests.faults.work`)."""
    return prepare(tmp_path_factory.mktemp("faults"))


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no write pass byte ``size`` of its file, as if the disk were full there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _mount(options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(size)``: a folder on a disk of ``size`` bytes; called again, the same, resized."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(size: int) -> Path:
        options = f"size={size}" if not os.path.ismount(folder) else f"remount,size={size}"
        ran = _mount(options, folder)
        if ran.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {ran.stderr.strip()}")
        return folder

    yield mounted
    subprocess.run(["umount", folder], capture_output=True)


@pytest.fixture
def read_only(tmp_path) -> Iterator[Path]:
    """A folder that cannot be written to, not by root either."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    mounted = False
    if os.geteuid() == 0:
        ran = _mount("ro", folder)
        if ran.returncode:
            pytest.skip(f"root writes anywhere, and no read-only folder can be mounted: {ran.stderr.strip()}")
        mounted = True
    yield folder
    if mounted:
        subprocess.run(["umount", folder], capture_output=True)
    folder.chmod(0o755)
