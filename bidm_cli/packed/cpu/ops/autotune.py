"""Autotuning: the first layer of a shape times a few tiles of the inner loop and remembers the best.

    tile = Tuner().choose(geometry, (images, height, width))

All candidates compute the same bits; only their speed differs. Choices are kept in the user's cache folder,
one file per CPU, number of threads and version of the kernels. The table of
:mod:`bidm_cli.packed.cpu.codegen.isa` is the starting point, and the answer where timing is off
(``BIDM_TUNE=0``), has used up its time, or finds nothing clearly better.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import torch

from bidm_cli.errors import BidmError
from bidm_cli.files import cache_folder, write_atomically
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.cpu.codegen.isa import Tile, cpu_model, instruction_set, tiles_for
from bidm_cli.packed.cpu.ops.conv import ConvPlan
from bidm_cli.packed.cpu.ops.weights import CpuWeights
from bidm_cli.packed.cpu.runtime.kernel_cache import sources_digest
from bidm_cli.packed.format.bits import words_per_tap

SWITCH = "BIDM_TUNE"
"""Environment variable; 0 turns timing off."""

SHAPE_SECONDS, ALL_SECONDS = 0.03, 1.5
"""Limits of the time for tuning one shape, and all shapes of a process."""

ROUNDS = 20
"""Runs per candidate, if the time allows."""

BETTER = 0.96
"""A candidate replaces the table's tile if it needs less than this share of its time."""

Size = tuple[int, int, int]
"""(images, height, width) of a layer's input."""


class Tuner:
    """Tuned tiles of this machine.

    Args:
        path: cache file; None keeps them in memory.
        allowance: seconds that timing may take in all.
    """

    def __init__(self, path: Path | None = None, allowance: float = ALL_SECONDS) -> None:
        self.path, self.allowance = path, allowance
        self.known = _read(path)

    def choose(self, geometry: LayerGeometry, size: Size, planes: int = 1) -> Tile:
        """Choose the tile for a layer of so many activation planes on inputs of this size."""
        tiles = {str(tile): tile for tile in tiles_for(geometry)}
        name = shape_class(geometry, size) + (f", {planes} planes" if planes > 1 else "")
        if self.known.get(name) not in tiles:
            if len(tiles) == 1 or self.allowance <= 0:
                return next(iter(tiles.values()))
            began = time.perf_counter()
            self.known[name] = str(fastest(geometry, size, list(tiles.values()), planes))
            self.allowance -= time.perf_counter() - began
            self._write()
        return tiles[self.known[name]]

    def _write(self) -> None:
        if self.path is None:
            return
        self.known = {**_read(self.path), **self.known}
        # A cache that cannot be written is no reason to stop.
        with contextlib.suppress(BidmError), write_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(self.known, indent=1, sort_keys=True))


def shape_class(geometry: LayerGeometry, size: Size) -> str:
    """Cache key, the same for layers of equal window, filters, stride, and pixels to a power of two."""
    kernel, stride = ("x".join(map(str, pair)) for pair in (geometry.kernel, geometry.stride))
    height, width = geometry.output_size(size[1], size[2])
    pixels = (size[0] * height * width).bit_length()
    return f"{kernel}/{stride} {words_per_tap(geometry.in_channels)}->{geometry.out_channels} 2^{pixels}"


def fastest(
    geometry: LayerGeometry, size: Size, tiles: list[Tile], planes: int = 1, limit: float = SHAPE_SECONDS
) -> Tile:
    """Time tiles in turns for at most about ``limit`` seconds and return the fastest.

    It is the first one unless another is clearly better.
    """
    shape = (geometry.out_channels, geometry.taps, words_per_tap(geometry.in_channels))
    words = torch.zeros(shape, dtype=torch.int32)
    scale = torch.ones(planes - 1) if planes > 1 else None
    plans = [ConvPlan(CpuWeights.make(words, geometry, tile, plane_scale=scale), size) for tile in tiles]
    out = torch.empty(size[0], *plans[0].out_size, geometry.out_channels)
    least = [float("inf")] * len(tiles)
    end = time.perf_counter() + limit
    for plan in plans:
        plan.convolve(out)
    for _ in range(ROUNDS):
        if time.perf_counter() > end:
            break
        for i, plan in enumerate(plans):
            began = time.perf_counter()
            plan.convolve(out)
            least[i] = min(least[i], time.perf_counter() - began)
    best = min(range(len(tiles)), key=least.__getitem__)
    return tiles[best] if least[best] < BETTER * least[0] else tiles[0]


def _read(path: Path | None) -> dict[str, str]:
    """Tiles by shape class from a cache file; empty if the file is missing or damaged."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def cache_path() -> Path:
    """Cache file of this CPU, number of threads and version of the kernels."""
    about = f"{cpu_model()} {instruction_set()} {torch.get_num_threads()} {sources_digest()}"
    return cache_folder() / f"tiles-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


@functools.cache
def _tuner(path: Path) -> Tuner:
    return Tuner(path)


def tuned_tile(geometry: LayerGeometry, size: Size, planes: int = 1) -> Tile:
    """Choose the tile for a layer on inputs of this size: timed, remembered, or the table's."""
    if os.environ.get(SWITCH, "1") == "0":
        return tiles_for(geometry)[0]
    try:
        return _tuner(cache_path()).choose(geometry, size, planes)
    except RuntimeError:  # no home folder
        return tiles_for(geometry)[0]
