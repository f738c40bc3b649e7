"""Several processes that join each other: forks of the test for training, whole commands for the rest."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # which each process would import on its own, in its first step

from bidm_cli.parallel.place import own_place
from bidm_cli.parallel.processes import Processes, joined

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(count: int, work: Callable[[Processes], None], expected: int = 0) -> None:
    """``work`` in ``count`` processes; each must end with the exit status ``expected``."""
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
            os.kill(child, 9)
            os.waitpid(child, 0)
    assert codes == dict.fromkeys(range(count), expected), codes


def _child(rank: int, count: int, port: int, work: Callable[[Processes], None]) -> None:
    status = 1
    try:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        assert own_place().size == count
        with joined("cpu") as processes:
            work(processes)
        status = 0
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
