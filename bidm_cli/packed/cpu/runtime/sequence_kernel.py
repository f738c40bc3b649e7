"""A program: kernels one after the other in one team of threads, without Python or a new team in between.

    for each item:  the threads share its kernel's work;  when all of it is done, the next one begins

Nobody waits for a thread that has not come yet. An item is done when its work has all been taken and every
thread that entered it has returned (work is only taken between the two). A thread that comes late, or was
held up between two items, goes straight on to the current one; should it still enter an item that is done, it
finds nothing left to take and touches nothing but the item's own record.

While a thread waits for another to finish what it took it spins, and from some point on sleeps: on a busy
machine the one it waits for may need its core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, njit

from bidm_cli.packed.cpu.codegen.vector import (
    add_to_shared,
    address_of,
    call,
    joined,
    load_long,
    load_shared,
    pause,
    replace_shared,
)
from bidm_cli.packed.cpu.runtime.args import ENTERED, PROGRAM_JOB, RETURNED

SPINS = 1 << 11
"""Looks at a counter before a waiting thread sleeps, some tens of microseconds."""

NAP = 20
"""Microseconds that it sleeps then. A core that goes idle takes over a thread that waits for another core,
such as the one waited for; giving way alone (sched_yield) leaves it where it is."""

ITEM = 24
"""Bytes of an item."""

_CURRENT = PROGRAM_JOB.fields["current"][1]  # type: ignore[index]


@njit(inline="always", error_model="numpy")
def _wait_for(job: Any, current: Any, number: Any, item: Any) -> None:
    """Until item ``number`` is done and somebody has gone on to the next."""
    looks = 0
    while load_shared(current) == number:
        returned = load_shared(item + RETURNED)
        # In this order: whoever is counted here is counted among those that entered, too.
        if returned == load_shared(item + ENTERED):
            replace_shared(current, number, number + 1)
        looks += 1
        if looks > SPINS and job.give_way:
            call(job.give_way, NAP)
        else:
            pause()


def program_kernel() -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.runtime.compile.compiled`; reads a PROGRAM_JOB."""

    def program(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        current = address_of(jobs) + _CURRENT
        found_work = False
        while True:
            number = load_shared(current)
            if number >= job.count:
                break
            found_work = True
            line = job.items + ITEM * number
            item = load_long(line + 8)
            if add_to_shared(item + ENTERED, 1) < load_long(line + 16):
                call(load_long(line), item)
            add_to_shared(item + RETURNED, 1)
            _wait_for(job, current, number, item)
        joined(jobs, found_work)

    return program
