"""The rate that the CPU kernels' inner loop reaches on this machine, as a limit to measure layers by."""

from __future__ import annotations

import torch

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.report.bench.step import timed

_ROWS, _CHANNELS, _FILTERS, _ROUNDS = 4096, 2016, 64, 30
"""A group of filters that stays in the first-level cache, and windows long enough to hide all else."""


def products_per_second(backend: str) -> float:
    """Products of signs per second, on torch's number of threads, of the kernel at its best.

    That is one group of filters on many long windows, without packing or scales. 0 for a backend other than
    numba.
    """
    if backend != "numba":
        return 0.0
    from bidm_cli.packed.cpu.codegen.isa import tiles_for
    from bidm_cli.packed.cpu.ops.conv import ConvPlan
    from bidm_cli.packed.cpu.ops.weights import CpuWeights
    from bidm_cli.packed.format.bits import words_per_tap

    geometry = LayerGeometry("linear", _CHANNELS, _FILTERS)
    words = torch.zeros(_FILTERS, 1, words_per_tap(_CHANNELS), dtype=torch.int32)
    plan = ConvPlan(CpuWeights.make(words, geometry, tiles_for(geometry)[0]), (1, 1, _ROWS))
    out = torch.empty(1, 1, _ROWS, _FILTERS)
    best = min(timed(lambda: plan.convolve(out)) for _ in range(_ROUNDS))
    return _ROWS * _CHANNELS * _FILTERS / best


def layer_products(geometry: LayerGeometry, shape: tuple[int, ...], planes: int) -> int:
    """Products of signs of a layer of so many activation planes on an input of this shape."""
    if geometry.kind == "linear":
        positions = torch.Size(shape[:-1]).numel()
    else:
        height, width = shape[-2:] if geometry.kind == "conv2d" else (1, shape[-1])
        positions = shape[0] * torch.Size(geometry.output_size(height, width)).numel()
    return planes * positions * geometry.fan_in * geometry.out_channels
