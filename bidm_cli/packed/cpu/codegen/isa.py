"""Instruction set that this process compiles for, and the tiles that go with it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bidm_cli.networks.geometry import LayerGeometry


@dataclass(frozen=True)
class Tile:
    """Tile of the inner loop, see :mod:`bidm_cli.packed.cpu.codegen.popcount`, with the method "amx"
    :mod:`bidm_cli.packed.cpu.codegen.amx`.

    Attributes:
        method: of counting bits. lanes: filters per vector of the epilogue.
        pixels, vectors: the tile holds ``pixels`` x ``vectors * lanes`` counts in registers, of pairs of
            pixels by the method "pairs".
    """

    method: str
    lanes: int
    pixels: int
    vectors: int

    @property
    def filters(self) -> int:
        """Filters per tile."""
        return self.lanes * self.vectors

    @property
    def pairs(self) -> bool:
        """True if it counts two windows at once by table (:mod:`bidm_cli.packed.cpu.codegen.lookup`)."""
        return self.method == "pairs"

    @property
    def multiplies(self) -> bool:
        """True if it multiplies signs as 8-bit numbers in place of counting bits."""
        return self.method == "amx"

    @property
    def rows(self) -> int:
        """Windows per tile."""
        return 2 * self.pixels if self.pairs else self.pixels

    def __str__(self) -> str:
        return f"{self.method} {self.pixels}x{self.vectors}x{self.lanes}"


LONG = 256
"""Words of the shortest window that counts as long."""

MOST_PAIRED = 2047
"""Words of the longest window that can be counted in pairs, with 16 bits per count."""

TILES = {
    "amx": (Tile("amx", 16, 32, 2), Tile("amx", 16, 32, 2)),
    "avx512-vpopcntdq": (Tile("direct", 16, 8, 2), Tile("direct", 16, 8, 2)),
    "avx512": (Tile("carry_save", 16, 2, 2), Tile("carry_save", 16, 2, 2)),
    "avx2": (Tile("pairs", 8, 2, 8), Tile("pairs", 8, 2, 8)),
    "neon": (Tile("bytes", 4, 4, 4), Tile("bytes", 4, 4, 4)),
    "generic": (Tile("bytes", 4, 2, 2), Tile("bytes", 4, 2, 2)),
}
"""By instruction set, for short and for long windows; benchmarks/cpu_layers.py compares them."""

CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "amx": (Tile("direct", 16, 8, 2),),
    "avx512-vpopcntdq": (Tile("direct", 16, 4, 2), Tile("direct", 16, 4, 4)),
    "avx512": (Tile("carry_save", 16, 4, 1),),
    "avx2": (Tile("carry_save", 8, 1, 2),),
    "neon": (Tile("bytes", 4, 2, 4),),
    "generic": (Tile("bytes", 4, 4, 1),),
}
"""Tiles that :mod:`bidm_cli.packed.cpu.ops.autotune` tries beside the table's; with as many lanes, so that
all give the same bits."""

SCORES = {
    "amx": "direct",
    "avx512-vpopcntdq": "direct",
    "avx512": "carry_save",
    "avx2": "bytes",
    "neon": "bytes",
    "generic": "bytes",
}
"""Methods of counting binary attention's scores; its keys' words lie side by side."""


def tiles_for(geometry: LayerGeometry) -> tuple[Tile, ...]:
    """Tiles that a layer can be counted with: the usual one by the length of its window, then others."""
    # It imports torch, which compiling processes do not need.
    from bidm_cli.packed.format.bits import words_per_tap

    window = geometry.taps * words_per_tap(geometry.in_channels)
    short, long = TILES[instruction_set()]
    tiles = (long if window >= LONG else short, *CANDIDATES[instruction_set()])
    return tuple(tile for tile in tiles if window <= MOST_PAIRED or not tile.pairs)


@dataclass(frozen=True)
class FloatTile:
    """Tile of the float product, see :mod:`bidm_cli.packed.cpu.codegen.matmul`."""

    lanes: int
    rows: int
    vectors: int


FLOAT_TILES = {
    "amx": FloatTile(16, 8, 2),
    "avx512-vpopcntdq": FloatTile(16, 8, 2),
    "avx512": FloatTile(16, 8, 2),
    "avx2": FloatTile(8, 6, 2),
    "neon": FloatTile(4, 4, 4),
    "generic": FloatTile(4, 4, 2),
}
"""The same for attention's float products."""


MATRIX_PIXELS, MATRIX_DEPTH = 16, 64
"""Rows of a matrix unit's tile, and its bytes per row: of signs, pixels and channels."""

MATRIX_SIDE = 32
"""Rows and columns of a block that a matrix unit multiplies at once, in products of floats."""


@functools.cache
def target() -> tuple[str, str, str]:
    """(triple, processor, features) that numba compiles for: this machine, or NUMBA_CPU_NAME and
    NUMBA_CPU_FEATURES.
    """
    from llvmlite import binding as llvm

    cpu, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if (cpu or "").lower() == "generic" else _host_features(llvm)
    return llvm.get_process_triple(), cpu or llvm.get_host_cpu_name(), features


def _host_features(llvm: Any) -> str:
    try:
        return str(llvm.get_host_cpu_features().flatten())
    except RuntimeError:  # LLVM does not know this processor
        return ""


@functools.cache
def instruction_set() -> str:
    """Return a key of :data:`TILES` by numba's target machine (:func:`target`)."""
    triple, _, listed = target()
    features = {name[1:] for name in listed.split(",") if name.startswith("+")}
    if {"avx512vpopcntdq", "amx-int8", "amx-bf16"} <= features and may_use_matrix_unit():
        return "amx"
    if {"avx512f", "avx512vl", "avx512bw"} <= features:
        return "avx512-vpopcntdq" if "avx512vpopcntdq" in features else "avx512"
    if "avx2" in features:
        return "avx2"
    if triple.startswith(("aarch64", "arm64")):
        return "neon"
    return "generic"


@functools.cache
def may_use_matrix_unit() -> bool:
    """Ask Linux for the matrix unit (AMX), which a process may only use after that; True if it may."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    prctl, request, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None).syscall(prctl, request, tile_data) == 0


@functools.cache
def cpu_model() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
