"""Kernel argument structs: one record per call, addresses and sizes side by side.

A kernel takes the address of its record and nothing else, which keeps a call from Python cheap: a plan fills
in a record once, and later calls only renew the addresses of inputs and outputs. Each kernel struct is in
:mod:`bidm_cli.packed.cpu.ops.structs`. Addresses are int64; sizes count elements, not bytes, unless named so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

OPTIONAL = np.dtype(np.int64, metadata={"optional": True})
"""Type of an int64 field that is 0 where it is left out."""

Source = tuple[Callable[[Any], None], np.dtype]
"""A kernel as a Python function of the address of its struct, for numba, and the struct."""

HEADER = (
    "counter",  # next item, shared by the threads
    "workers",  # threads that found work
    "arrivals",  # threads that took a workspace of their own, in attention
    "entered",  # threads that a kernel sequence let in
    "returned",  # threads that came back from that
)
"""First fields of every struct, int64, 0 at the start."""

ARRIVALS, ENTERED, RETURNED = (8 * HEADER.index(name) for name in ("arrivals", "entered", "returned"))
"""Offsets of header fields, in bytes."""


def args_dtype(*fields: tuple[str, Any]) -> np.dtype:
    """The struct of a kernel: the header, then (name, type) of its own fields."""
    return np.dtype([*((name, OPTIONAL) for name in HEADER), *fields], align=True)


SEQUENCE_ARGS = args_dtype(
    ("current", np.int64),  # the item that threads are at; 0 at the start
    ("items", np.int64),  # int64 [count, 3]: address of a kernel, of its arguments, most threads in it
    ("count", np.int64),
    ("give_way", OPTIONAL),  # address of usleep
)


@functools.cache
def _fields(kind: np.dtype) -> tuple[frozenset[str], frozenset[str]]:
    """(required, all) fields of a struct."""
    names = frozenset(kind.names or ())
    return frozenset(name for name in names if not kind[name].metadata), names


def record(kind: np.dtype, values: Mapping[str, Any], per_call: tuple[str, ...] = ()) -> np.ndarray:
    """New array of one argument struct with these values; optional fields that are left out are 0.

    Args:
        per_call: fields that each call fills in, through ``array[list(per_call)][0] = values`` (numpy raises
            unless there is one value per field).

    Raises:
        TypeError: a field that the struct has not, or one without a value.
    """
    required, names = _fields(kind)
    named = values.keys() | per_call
    if not required <= named <= names:
        missing, unknown = sorted(required - named), sorted(named - names)
        raise TypeError(f"kernel arguments: missing {missing}, unknown {unknown}")
    array = np.zeros(1, kind)
    array[0] = tuple([values.get(name, 0) for name in kind.names or ()])
    return array
