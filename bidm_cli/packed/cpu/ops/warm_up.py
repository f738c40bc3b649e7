"""Compilation ahead of time of the kernels that a network needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from bidm_cli.packed.cpu.codegen.isa import CANDIDATES, TILES, instruction_set, tiles_for
from bidm_cli.packed.cpu.ops import kernels
from bidm_cli.packed.cpu.ops.structs import PACK_FORMS
from bidm_cli.packed.cpu.runtime import kernel_cache
from bidm_cli.packed.cpu.runtime.compile import Kernel, compile_in_processes
from bidm_cli.packed.cpu.runtime.kernels import launcher_of
from bidm_cli.packed.cpu.runtime.sequence import SEQUENCE
from bidm_cli.packed.uses import Use


def prepare(uses: Iterable[Use] | None = None, say: Callable[[str], None] = lambda text: None) -> None:
    """Compile the kernels that ``uses`` need, or all of them, unless they are in the cache; load them.

    ``say`` gets pieces of one line about it, a number per kernel; nothing if all were in the cache.
    """
    needed = all_kernels() if uses is None else kernels_for(uses)
    missing = [kernel for kernel in needed if kernel_cache.read(kernel.name) is None]
    if missing:
        began, keeps = time.perf_counter(), kernel_cache.is_writable()
        how = "once" if keeps else "as its cache cannot be written to"
        say(f"compiling {len(missing)} kernels for this machine, {how}:")
        done = compile_in_processes(missing, torch.get_num_threads()) if keeps else _here(missing)
        for number, _ in enumerate(done, 1):
            say(f" {number}")
        say(f", {time.perf_counter() - began:.0f} s\n")
    for kernel in needed:
        launcher_of(kernel)


def _here(missing: list[Kernel]) -> Iterator[Kernel]:
    for kernel in missing:
        launcher_of(kernel)
        yield kernel


def kernels_for(uses: Iterable[Use]) -> list[Kernel]:
    """Kernels of a network's modules; of a norm's two forms, with SiLU and without, one may go unused."""
    found = {SEQUENCE: None}
    for use in uses:
        found |= dict.fromkeys(_kernels_for(use))
    return list(found)


def all_kernels() -> list[Kernel]:
    """Every kernel that this machine's layers may need."""
    isa = instruction_set()
    found = [SEQUENCE, kernels.norm(), kernels.blend(), *map(kernels.pack, PACK_FORMS)]
    found += map(kernels.conv, (*TILES[isa], *CANDIDATES[isa]))
    found += (*kernels.float_attention("float32"), *kernels.binary_attention(), *kernels.winograd())
    return list(dict.fromkeys(found))


def _kernels_for(use: Use) -> tuple[Kernel, ...]:
    if use.method == "run":
        assert use.geometry is not None
        return (kernels.pack("plain"), *map(kernels.conv, tiles_for(use.geometry)))
    by_method: dict[str, Callable[[], tuple[Kernel, ...]]] = {
        "group norm": lambda: (kernels.norm(), kernels.pack("normed"), kernels.pack("normed_silu")),
        "RMS norm": lambda: (kernels.pack("rms"), kernels.pack("rms_silu")),
        "attention": lambda: kernels.float_attention("float32"),
        "bfloat16 attention": lambda: kernels.float_attention("bfloat16"),
        "binary_attention": kernels.binary_attention,
        "convolve": kernels.winograd,
        "blend": lambda: (kernels.blend(),),
    }
    return by_method[use.method]()
