"""Compiled kernels: each form is compiled when it is first needed and kept on disk between processes.

numba's cache only looks at the file that a kernel is written in. The code that a kernel calls is in other
files, so its name in the cache carries a digest of all of them: an old cache is never used by new code.
"""

from __future__ import annotations

import functools
import hashlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.errors import NumbaWarning

from bidm_cli.packed.cpu.codegen.isa import CANDIDATES, FLOAT_TILES, TILES, FloatTile, Tile, instruction_set
from bidm_cli.packed.cpu.ops import binary_attention_kernel
from bidm_cli.packed.cpu.ops.attention_kernel import arrange_kernel, attend_kernel
from bidm_cli.packed.cpu.ops.blend_kernel import mix_kernel
from bidm_cli.packed.cpu.ops.conv_kernel import conv_kernel
from bidm_cli.packed.cpu.ops.norm_kernel import norm_kernel
from bidm_cli.packed.cpu.ops.pack_kernel import FORMS, pack_kernel
from bidm_cli.packed.cpu.runtime.args import ATTENTION_JOB, CONV_JOB, MIX_JOB, NORM_JOB, PACK_JOB, PROGRAM_JOB
from bidm_cli.packed.cpu.runtime.sequence_kernel import program_kernel
from bidm_cli.packed.cpu.runtime.threads import Launch, launcher


@functools.cache
def sources_digest() -> str:
    """Identifies the text of everything that is compiled into kernels."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def compiled(source: Callable[..., None], form: str, record: np.dtype) -> Any:
    """A kernel as a C function of the address of one ``record``.

    ``form`` tells apart the kernels that one source makes. Without a writable place for the cache it is
    compiled anew in every process.
    """
    source.__qualname__ = f"{source.__name__}_{form}_{sources_digest()}"
    signature = numba.types.void(numba.types.CPointer(numba.from_dtype(record)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaWarning)
        try:
            kernel = numba.cfunc(signature, cache=True, error_model="numpy")(source)
        except (RuntimeError, OSError):
            kernel = numba.cfunc(signature, error_model="numpy")(source)
    if not kernel.cache_hits:
        _FRESH.append(source.__name__)
    return kernel


_FRESH: list[str] = []
"""Kernels that this process did not find in the cache."""


@functools.cache
def pack_launcher(form: str) -> Launch:
    """:mod:`bidm_cli.packed.cpu.ops.pack_kernel` in one of its forms, ready to run."""
    return _launcher(pack_kernel(form), form, PACK_JOB)


@functools.cache
def norm_launcher() -> Launch:
    """:mod:`bidm_cli.packed.cpu.ops.norm_kernel`, ready to run."""
    return _launcher(norm_kernel(), "32", NORM_JOB)


@functools.cache
def mix_launcher() -> Launch:
    """:mod:`bidm_cli.packed.cpu.ops.blend_kernel`, ready to run."""
    return _launcher(mix_kernel(), "32", MIX_JOB)


@functools.cache
def program_launcher(long: bool) -> Launch:
    """:mod:`bidm_cli.packed.cpu.runtime.sequence_kernel`, ready to run; ``long`` as :func:`launcher`."""
    return _launcher(program_kernel(), "", PROGRAM_JOB, long)


@functools.cache
def conv_launcher(tile: Tile) -> Launch:
    """:mod:`bidm_cli.packed.cpu.ops.conv_kernel` for one form of the inner loop, ready to run."""
    source = conv_kernel(tile.method, tile.lanes, tile.pixels, tile.vectors)
    form = f"{tile.method}_{tile.lanes}_{tile.pixels}_{tile.vectors}"
    return _launcher(source, form, CONV_JOB)


@functools.cache
def attention_launchers(tile: FloatTile) -> tuple[Launch, Launch]:
    """The two kernels of :mod:`bidm_cli.packed.cpu.ops.attention_kernel`, ready to run."""
    arrange, attend = (
        arrange_kernel(tile.lanes, tile.vectors),
        attend_kernel(tile.lanes, tile.rows, tile.vectors),
    )
    form = f"{tile.lanes}_{tile.rows}_{tile.vectors}"
    return _launcher(arrange, form, ATTENTION_JOB), _launcher(attend, form, ATTENTION_JOB)


@functools.cache
def binary_attention_launchers(tile: FloatTile) -> tuple[Launch, Launch]:
    """The two kernels of :mod:`bidm_cli.packed.cpu.ops.binary_attention_kernel`, ready to run."""
    method = TILES[instruction_set()][0].method
    arrange = binary_attention_kernel.arrange_kernel(tile.lanes, tile.vectors)
    attend = binary_attention_kernel.attend_kernel(method, tile.lanes, tile.rows, tile.vectors)
    form, job = f"{tile.lanes}_{tile.rows}_{tile.vectors}", binary_attention_kernel.BINARY_ATTENTION_JOB
    return _launcher(arrange, form, job), _launcher(attend, f"{method}_{form}", job)


def compile_all(say: Callable[[str], None] = lambda text: None) -> None:
    """Compile every kernel that this machine's layers may need, or find it in the cache.

    ``say`` is told in two pieces of one line that kernels are compiled, and how long it took; nothing if all
    were in the cache.
    """
    began, known = time.perf_counter(), len(_FRESH)
    jobs: list[Callable[[], object]] = [functools.partial(pack_launcher, form) for form in FORMS]
    jobs += [norm_launcher, mix_launcher, functools.partial(program_launcher, True)]
    tiles = (*TILES[instruction_set()], *CANDIDATES[instruction_set()])
    jobs += [functools.partial(conv_launcher, tile) for tile in tiles]
    for launchers in (attention_launchers, binary_attention_launchers):
        jobs.append(functools.partial(launchers, FLOAT_TILES[instruction_set()]))
    told = False
    for job in jobs:
        job()
        if len(_FRESH) > known and not told:
            told = True
            say("compiling kernels for this machine, once:")
    if told:
        say(f" {time.perf_counter() - began:.0f} s\n")


_ALIVE: dict[int, tuple[str, Any]] = {}
"""By address: a kernel's name, and the object that its machine code lives as long as."""


def kernel_name(address: int) -> str:
    """What the kernel at an address is called, for tables: its source and form."""
    return _ALIVE[address][0]


def _launcher(source: Callable[..., None], form: str, record: np.dtype, long: bool = False) -> Launch:
    kernel = compiled(source, form, record)
    _ALIVE[kernel.address] = f"{source.__name__} {form}", kernel
    return launcher(kernel.address, record.itemsize, long)
