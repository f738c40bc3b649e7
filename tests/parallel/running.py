"""Several processes that join each other: forks of the test for training, whole commands for the rest."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # which each process would import on its own, in its first step

from bidm_cli.cli.main import main
from bidm_cli.parallel.place import own_place
from bidm_cli.parallel.processes import Processes, joined

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(count: int, work: Callable[[Processes], None], expected: int = 0) -> None:
    """``work`` in ``count`` processes that have joined; each must end with the exit status ``expected``."""

    def join_and_work() -> None:
        with joined("cpu") as processes:
            work(processes)

    assert forked(count, join_and_work) == [expected] * count


def bidm_together(count: int, folder: Path, *words: object) -> tuple[list[int], str, str]:
    """``bidm`` with ``words`` in ``count`` processes: exit statuses, and what all of them wrote."""

    def work() -> None:
        for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
            stream.flush()
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1 if name == "out" else 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["bidm", *map(str, words)]
        try:
            main()
        finally:
            sys.stdout.flush()

    folder.mkdir(exist_ok=True)
    for name in ("out", "err"):
        (folder / name).write_text("")
    statuses = forked(count, work)
    # torch, imported before, logs warnings that a command of its own would not.
    err = (folder / "err").read_text().splitlines(keepends=True)
    logged = r"\[rank\d\]:\[W|Exception raised from|frame #|<omitting|\s*$"
    own = "".join(line for line in err if not re.match(logged, line))
    return statuses, (folder / "out").read_text(), own


def forked(count: int, work: Callable[[], None]) -> list[int]:
    """``work`` in ``count`` forks placed in one run; their exit statuses, -9 for one that had to be ended."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _child(rank, count, port, work)
        children.append(child)
    deadline, codes = time.monotonic() + SECONDS, dict[int, int]()
    while len(codes) < count and time.monotonic() < deadline:
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.02)
    for rank, child in enumerate(children):
        if rank not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [codes.get(rank, -signal.SIGKILL) for rank in range(count)]


def _child(rank: int, count: int, port: int, work: Callable[[], None]) -> None:
    status = 1
    try:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        assert own_place().size == count
        work()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def command(*words: object, torchrun: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """``bidm`` with ``words`` in a process of its own, or under torchrun in that many."""
    start = ["-m", "bidm_cli"]
    if torchrun:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}", *start]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
