"""``--threads``, and an OpenMP that sleeps when it has to wait.

All that computes on the CPU runs in one pool, torch's OpenMP team
(:mod:`bidm_cli.packed.cpu.runtime.threads`), so one number is all there is to choose. The OpenMP runtime
reads its settings when torch is imported; the command line therefore settles them first, in the environment,
where measuring processes find them too.

A thread that waits spins before it sleeps, with libgomp's defaults for milliseconds; on a machine with other
work it spins on the very core that the thread it waits for needs. Measured on 2 cores with torch 2.14
(libgomp), 2 threads, the digits network: milliseconds of a float step, a packed step and a training step, as
medians of seconds-long runs, by GOMP_SPINCOUNT (on the busy machine they scatter by a factor of two):

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

SPINS = "1000"
"""Turns that a waiting thread spins: some microseconds, about the gap between two loops of a network."""

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


def settle_openmp() -> None:
    """Choose what the user left open: threads, and how long they spin. Of no use once torch is imported."""
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def use_threads(count: int) -> None:
    """Compute with ``count`` threads in this process, and in those that it starts."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)


def threads_option(command: Command) -> Command:
    """Give a command ``--threads N``."""

    def chosen(context: click.Context, parameter: click.Parameter, count: int | None) -> None:
        if count is not None:
            use_threads(count)

    return click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        expose_value=False,
        callback=chosen,
        help="CPU threads.  [default: OMP_NUM_THREADS, else all cores this process may use]",
    )(command)
