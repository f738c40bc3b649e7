"""``--processes``: the same command in several processes of this machine, which share its work out."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from bidm_cli.cli.options import choose_device
from bidm_cli.cli.threads import CHOSEN, available_cores
from bidm_cli.parallel.place import own_place

_ASKED = f"{__name__}.asked"


def asked_processes() -> int:
    """Number that ``--processes`` gave to the command that runs."""
    return int(click.get_current_context().meta[_ASKED])


def processes_option(way_out: str) -> Callable[[Any], Any]:
    """``--processes`` for a command that shares its work out among them.

    The command itself runs in those processes; in the one that starts them it is not called, but for a dry
    run where this machine cannot run as many at once.

    Args:
        way_out: what to do after one of them was killed.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(processes: int | None, **values: Any) -> Any:
            count = processes or 1
            here = count == 1 or own_place().size > 1
            if here or (values.get("dry_run") and not _fit_here(count, values["options"].device)):
                click.get_current_context().meta[_ASKED] = count
                return command(**values)
            return _start(count, way_out)

        return click.option(
            "--processes",
            type=click.IntRange(1, 1024),
            help="Processes on this machine that share the work out, one per GPU or part of the CPU's cores; "
            "torchrun starts them on several machines.  [default: 1]",
        )(wrapped)

    return add


def _fit_here(count: int, device: object) -> bool:
    """True if so many processes have a core, or a GPU, each."""
    if choose_device(str(device)) == "cpu":
        return count <= available_cores()
    import torch

    return count <= torch.cuda.device_count()


def _start(count: int, way_out: str) -> None:
    from bidm_cli.parallel.launch import launch, this_command

    environment = dict(os.environ)
    if environment.pop(CHOSEN, None):  # each process takes its part of the cores
        environment.pop("OMP_NUM_THREADS", None)
    status = launch(count, this_command(), way_out, environment)
    if status:
        sys.exit(status)
