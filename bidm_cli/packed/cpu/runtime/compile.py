"""Compiled kernels: each form is compiled when it is first needed and kept on disk between processes.

numba's cache only looks at the file that a kernel is written in. The code that a kernel calls is in other
files, so its name in the cache carries a digest of all of them: an old cache is never used by new code.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.errors import NumbaWarning

from bidm_cli.packed.cpu.runtime.threads import Launch, launcher

SOURCES = Path(__file__).parents[1]
"""Folder of everything that is compiled into kernels."""

FRESH: list[str] = []
"""Kernels that this process did not find in the cache."""

LOADED: dict[int, tuple[str, Any]] = {}
"""By address: a kernel's name, and the object that its machine code lives as long as."""


@functools.cache
def sources_digest(folder: Path = SOURCES) -> str:
    """Digest of all Python sources in a folder and below."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def compiled(source: Callable[..., None], form: str, args: np.dtype) -> Any:
    """Compile a kernel to a C function of the address of one ``args`` record.

    ``form`` tells apart the kernels that one source makes. Without a writable place for the cache it is
    compiled anew in every process.
    """
    source.__qualname__ = f"{source.__name__}_{form}_{sources_digest()}"
    signature = numba.types.void(numba.types.CPointer(numba.from_dtype(args)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaWarning)
        try:
            kernel = numba.cfunc(signature, cache=True, error_model="numpy")(source)
        except (RuntimeError, OSError):
            kernel = numba.cfunc(signature, error_model="numpy")(source)
    if not kernel.cache_hits:
        FRESH.append(source.__name__)
    return kernel


def kernel_launcher(
    source: Callable[..., None], form: str, args: np.dtype, always_in_team: bool = False
) -> Launch:
    """Compile a kernel and make its launcher; ``always_in_team`` as in :func:`launcher`."""
    kernel = compiled(source, form, args)
    LOADED[kernel.address] = f"{source.__name__} {form}", kernel
    return launcher(kernel.address, args.itemsize, always_in_team)


def kernel_name(address: int) -> str:
    """Source and form of the kernel at an address, for tables."""
    return LOADED[address][0]
