"""Packed layers against torch's float convolutions on the CPU, per shape.

    python benchmarks/cpu_layers.py                     # the layers of LDM-4 (LSUN-Bedrooms) at batch 1
    python benchmarks/cpu_layers.py --threads 1 --tiles # and every form of the inner loop on them
    python benchmarks/cpu_layers.py --planes 2          # and the layers with two activation planes

A 3x3 convolution that is less than 8x as fast packed is marked.

The two sides alternate, so that whatever else the machine does hits both; the best and the median ratio over
the rounds are shown. Before each call its input is read once, as the layer before would have left it in the
caches. Float is torch in the quicker of its two memory formats for that shape. Packed is the whole layer:
signs, packing, the scale map, products, bias and shortcut.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import platform
from collections.abc import Callable
from statistics import median

import calm_openmp  # noqa: F401
import torch
from random_models import packed_from
from record import add_record_option, record
from torch import nn

from bidm_cli.cli.threads import available_cores, use_threads
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.cpu.codegen.isa import Tile, instruction_set
from bidm_cli.packed.cpu.runtime.threads import description
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.bench.step import time_in_turn

CONV = BinarySpec()
PLAIN = BinarySpec(activation_scale="none", shortcut="none")

# in, out, kernel, stride, height and width, parts of the method
SHAPES = [
    (224, 224, 3, 1, 64, CONV),
    (448, 224, 3, 1, 64, CONV),
    (672, 224, 3, 1, 64, CONV),
    (448, 448, 3, 1, 32, CONV),
    (896, 448, 3, 1, 32, CONV),
    (1120, 448, 3, 1, 32, CONV),
    (672, 672, 3, 1, 16, CONV),
    (1344, 672, 3, 1, 16, CONV),
    (896, 896, 3, 1, 8, CONV),
    (1792, 896, 3, 1, 8, CONV),
    (224, 224, 3, 2, 64, CONV),
    (448, 224, 1, 1, 64, CONV),
    (896, 448, 1, 1, 32, CONV),
    (448, 1344, 1, 1, 32, PLAIN),
    (672, 672, 1, 1, 16, PLAIN),
]

TILES = [
    *(Tile("direct", 16, pixels, vectors) for pixels, vectors in ((8, 2), (4, 4), (4, 2), (6, 3), (8, 1))),
    *(Tile("carry_save", 16, pixels, vectors) for pixels, vectors in ((2, 2), (4, 1))),
    *(Tile("carry_save", 8, pixels, vectors) for pixels, vectors in ((1, 2), (2, 1), (2, 2))),
    *(Tile("bytes", 8, pixels, vectors) for pixels, vectors in ((2, 2), (4, 1), (4, 2))),
    *(Tile("pairs", 8, pixels, vectors) for pixels, vectors in ((4, 4), (2, 8))),
]


def alternate(
    calls: dict[str, Callable[[torch.Tensor], object]], inputs: dict[str, torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds per call and round, by name; a first round is thrown away."""
    bound = {name: functools.partial(call, inputs[name]) for name, call in calls.items()}
    times = time_in_turn(bound, rounds + 1, before=lambda name: inputs[name].sum())
    return {name: found[1:] for name, found in times.items()}


GOAL = 8.0
"""What a 3x3 convolution should reach, packing included."""


def compare(shape: tuple, batch: int, rounds: int, tiles: bool, planes: int) -> tuple[str, dict[str, float]]:
    """Print the line of a shape, and return its name and numbers."""
    channels, filters, kernel, stride, size, spec = shape
    conv = nn.Conv2d(channels, filters, kernel, stride, padding=kernel // 2)
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    layer = packed_from(conv, spec, "numba")
    x = torch.randn(batch, channels, size, size)
    x_last = x.contiguous(memory_format=torch.channels_last)
    inputs = {"contiguous": x, "channels_last": x_last, "packed": x_last}
    calls = {"contiguous": conv, "channels_last": last, "packed": layer}
    if planes > 1:
        calls["planes"] = packed_from(conv, dataclasses.replace(spec, planes=planes), "numba")
        inputs["planes"] = x_last
    times = alternate(calls, inputs, rounds)
    form = min(("contiguous", "channels_last"), key=lambda name: median(times[name]))
    macs = batch * (size // stride) ** 2 * channels * filters * kernel**2
    best, middle = (f(times[form]) / f(times["packed"]) for f in (min, median))
    mark = f"  UNDER {GOAL:g}x" if kernel == 3 and middle < GOAL else ""
    name = f"{channels:5} -> {filters:<5} {kernel}x{kernel} /{stride} {size:3}x{size:<3}"
    print(
        f"{name}"
        f" {1e3 * min(times[form]):9.3f} {1e3 * min(times['packed']):9.3f} ms"
        f" {best:7.1f}x best {middle:6.1f}x median {macs / min(times['packed']) / 1e9:7.0f} GMAC/s"
        f"  {form}{mark}"
    )
    numbers = {
        "float_seconds": median(times[form]),
        "packed_seconds": median(times["packed"]),
        "ratio": middle,
    }
    if planes > 1:
        longer = [a / b for a, b in zip(times["planes"], times["packed"], strict=True)]
        numbers[f"planes_{planes}"] = median(longer)
        print(f"      {planes} planes {1e3 * min(times['planes']):22.3f} ms {median(longer):17.2f}x the time")
    if tiles:
        forms = {str(tile): _with_tile(layer, tile) for tile in TILES}
        found = alternate(forms, dict.fromkeys(forms, x_last), rounds)
        for tile, seconds in sorted(found.items(), key=lambda item: min(item[1])):
            print(f"      {tile:20} {macs / min(seconds) / 1e9:7.0f} GMAC/s")
    return f"{' '.join(name.split())}, batch {batch}", numbers


def _with_tile(layer: PackedLayer, tile: Tile) -> Callable[[torch.Tensor], object]:
    own, backend = copy.deepcopy(layer).tensors, NumbaBackend(tile)
    return lambda x: backend.run(own, x)


def main() -> None:
    """Time the layers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiles", action="store_true", help="also time every form of the inner loop")
    parser.add_argument("--planes", type=int, default=1, help="also time so many activation planes")
    add_record_option(parser, "cpu_layers")
    options = parser.parse_args()
    use_threads(options.threads)
    print(f"{platform.platform()}, {instruction_set()}, torch {torch.__version__}, {description()}")
    print(f"{'layer':>33} {'float32':>9} {'packed':>9}")
    with torch.inference_mode():
        chosen = options.batch_size, options.rounds, options.tiles, options.planes
        found = dict(compare(shape, *chosen) for shape in SHAPES)
    if options.record:
        record(options.record, found, threads=options.threads)


if __name__ == "__main__":
    main()
