"""Sequence kernel: runs kernels one after the other in one team, without Python or a new team in between.

    for each item:  the threads share its kernel's work;  when all of it is done, the next one begins

No thread waits for one that has not come yet. An item is done when its work has all been taken and every
thread that entered it has returned (work is only taken between the two). A thread that comes late, or was
held up between two items, goes straight on to the current one; should it still enter an item that is done, it
finds nothing left to take and touches nothing but the item's own arguments.

While a thread waits for another to finish what it took it spins, and from some point on sleeps: on a busy
machine the one it waits for may need its core.
"""

from __future__ import annotations

from typing import Any

from numba import carray, njit

from bidm_cli.packed.cpu.codegen.vector import (
    add_to_shared,
    address_of,
    call,
    join,
    load_long,
    load_shared,
    pause,
    replace_shared,
)
from bidm_cli.packed.cpu.runtime.args import ENTERED, RETURNED, SEQUENCE_ARGS, Source

SPINS = 1 << 11
"""Looks at a counter before a waiting thread sleeps, some tens of microseconds."""

NAP = 20
"""Microseconds that it sleeps then. A core that goes idle takes over a thread that waits for another core,
such as the one waited for; giving way alone (sched_yield) leaves it where it is."""

ITEM = 24
"""Bytes of an item."""

_CURRENT = SEQUENCE_ARGS.fields["current"][1]  # type: ignore[index]


@njit(inline="always", error_model="numpy")
def _wait_for(args: Any, current: Any, number: Any, item: Any) -> None:
    """Wait until item ``number`` is done and a thread has gone on to the next."""
    looks = 0
    while load_shared(current) == number:
        returned = load_shared(item + RETURNED)
        # In this order: a thread that is counted here is counted among those that entered, too.
        if returned == load_shared(item + ENTERED):
            replace_shared(current, number, number + 1)
        looks += 1
        if looks > SPINS and args.give_way:
            call(args.give_way, NAP)
        else:
            pause()


def make_sequence() -> Source:
    """Make the kernel."""

    def sequence(pointer: Any) -> None:
        args = carray(pointer, (1,))[0]
        current = address_of(pointer) + _CURRENT
        number = load_shared(current)
        join(pointer, number < args.count)
        while number < args.count:
            line = args.items + ITEM * number
            item = load_long(line + 8)
            if add_to_shared(item + ENTERED, 1) < load_long(line + 16):
                call(load_long(line), item)
            add_to_shared(item + RETURNED, 1)
            _wait_for(args, current, number, item)
            number = load_shared(current)

    return sequence, SEQUENCE_ARGS
