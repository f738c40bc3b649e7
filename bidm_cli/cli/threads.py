"""``--threads``, and an OpenMP that sleeps when it has to wait.

All that computes on the CPU runs in torch's OpenMP team (:mod:`bidm_cli.packed.cpu.runtime.threads`). The
OpenMP runtime reads its settings when torch is imported; the command line therefore settles them first, in
the environment, where measuring processes find them too.

A thread that waits spins before it sleeps, with libgomp's defaults for milliseconds; on a machine with other
work it spins on the very core that the thread it waits for needs. Milliseconds of a float step, a packed step
and a training step of the digits network by GOMP_SPINCOUNT, medians, on 2 cores with torch 2.14 (libgomp) and
2 threads (on the busy machine they scatter by a factor of two):

                             unset             1000            300            0 (passive)
    nothing else runs        6.6, 3.2, 40      6.5, 3.4, 38    13, 3.9, 88    11, 3.5, 90
    1 to 2 others busy       448, 147, 330     37, 4.4, 148    14, 3.7, 130   10, 3.4, 124

1000 costs nothing on a quiet machine and stays within a small factor on a busy one; it is also what libgomp
takes by itself once it has more threads than cores.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import click

SPINS = "1000"
"""Turns that a waiting thread spins: some microseconds, about the gap between two loops of a network."""

CHOSEN = "BIDM_CHOSE_THREADS"
"""Environment variable: set where the number of threads is bidm's choice and not the user's."""

_CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores this process may use: by its affinity, and no more than its control group's quota pays for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _quota())))


def _quota() -> float:
    """Cores that the control group may keep busy, by cpu.max or version 1's quota; infinite if none."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((_CGROUP / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf


def settle_openmp(processes: int = 1) -> None:
    """Choose what the user left open: threads, and how long they spin. Of no use once torch is imported.

    Args:
        processes: how many of a run are on this machine and share its cores.
    """
    if "torch" in sys.modules:
        return
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
        os.environ[CHOSEN] = "1"
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def use_threads(count: int) -> None:
    """Compute with ``count`` threads in this process, and in those that it starts."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ.pop(CHOSEN, None)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    expose_value=False,
    callback=lambda context, parameter, count: None if count is None else use_threads(count),
    help="CPU threads.  [default: OMP_NUM_THREADS, else all cores this process may use]",
)
