"""Loads from a virtual concat of two NHWC tensors.

Channel c is at ``first + 4 c`` below ``split``, and at ``second + 4 c`` from there on (``second`` is the
address of the other tensor's pixel, less 4 split bytes).
"""

from __future__ import annotations

from typing import Any

from numba import njit

from bidm_cli.packed.cpu.codegen.vector import load_first_floats, load_floats, load_floats_between


@njit(inline="always", error_model="numpy")
def load_channels(first: Any, second: Any, split: Any, channel: Any, count: Any, lanes: Any) -> Any:
    """Load ``count`` channels from ``channel`` on, zeros in the other lanes."""
    at = 4 * channel + (second if channel >= split else first)
    if channel < split < channel + count:
        v = load_first_floats(at, split - channel, lanes)
        return v + load_floats_between(second + 4 * channel, split - channel, count, lanes)
    return load_floats(at, lanes) if count == lanes else load_first_floats(at, count, lanes)


@njit(inline="always", error_model="numpy")
def load_repeated(
    first: Any, second: Any, split: Any, channel: Any, step: Any, terms: Any, lanes: Any
) -> Any:
    """Load the sum of ``terms`` vectors, ``step`` channels apart; none of them crosses ``split``."""
    total = load_floats(4 * channel + (second if channel >= split else first), lanes)
    for j in range(1, terms):
        c = channel + j * step
        total = total + load_floats(4 * c + (second if c >= split else first), lanes)
    return total
