"""Compilation of all kernels ahead of time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from bidm_cli.packed.cpu.codegen.isa import CANDIDATES, FLOAT_TILES, PAIRS, TILES, instruction_set
from bidm_cli.packed.cpu.ops.attention_kernel import arrange_launcher, attend_launcher
from bidm_cli.packed.cpu.ops.binary_attention_kernel import arrange_binary_launcher, attend_binary_launcher
from bidm_cli.packed.cpu.ops.blend import blend_launcher
from bidm_cli.packed.cpu.ops.conv_kernel import conv_launcher
from bidm_cli.packed.cpu.ops.norm_kernel import norm_launcher
from bidm_cli.packed.cpu.ops.pack_kernel import FORMS, pack_launcher
from bidm_cli.packed.cpu.ops.winograd import winograd_launchers
from bidm_cli.packed.cpu.runtime.compile import FRESH
from bidm_cli.packed.cpu.runtime.sequence_kernel import sequence_launcher


def compile_all(say: Callable[[str], None] = lambda text: None) -> None:
    """Compile every kernel that this machine's layers may need, or find it in the cache.

    ``say`` gets two pieces of one line, that kernels are compiled and the time it took; nothing if all were
    in the cache.
    """
    began, known = time.perf_counter(), len(FRESH)
    isa = instruction_set()
    work: list[Callable[[], object]] = [functools.partial(pack_launcher, form) for form in FORMS]
    work += [norm_launcher, blend_launcher, functools.partial(sequence_launcher, True)]
    tiles = (*TILES[isa], *CANDIDATES[isa], *PAIRS.get(isa, ()))
    work += [functools.partial(conv_launcher, tile) for tile in tiles]
    for launcher in (arrange_launcher, attend_launcher, arrange_binary_launcher, attend_binary_launcher):
        work.append(functools.partial(launcher, FLOAT_TILES[isa]))
    work.append(winograd_launchers)
    announced = False
    for load in work:
        load()
        if len(FRESH) > known and not announced:
            announced = True
            say("compiling kernels for this machine, once:")
    if announced:
        say(f" {time.perf_counter() - began:.0f} s\n")
