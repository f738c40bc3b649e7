"""Kernels as functions to call: from the cache on disk, or compiled when they are first needed."""

from __future__ import annotations

import functools
from typing import Any

from bidm_cli.packed.cpu.runtime import kernel_cache
from bidm_cli.packed.cpu.runtime.compile import Kernel, compile_kernel
from bidm_cli.packed.cpu.runtime.threads import Launch, launcher

FRESH: list[str] = []
"""Kernels that this process compiled itself."""

LOADED: dict[int, tuple[str, Any]] = {}
"""By address: a kernel's name, and the object that its machine code lives as long as."""


@functools.cache
def launcher_of(kernel: Kernel, always_in_team: bool = False) -> Launch:
    """The function that runs a kernel; ``always_in_team`` as in :func:`launcher`.

    Without a writable place for the cache it is compiled anew in every process.
    """
    return launcher(_address(kernel), kernel.size, always_in_team)


@functools.cache
def _address(kernel: Kernel) -> int:
    code = kernel_cache.read(kernel.name)
    if code is None:
        code = compile_kernel(kernel)
        FRESH.append(kernel.name)
    address, kept = kernel_cache.link(code)
    LOADED[address] = kernel.name, kept
    return address


def kernel_name(address: int) -> str:
    """Source and form of the kernel at an address, for tables."""
    return LOADED[address][0]
