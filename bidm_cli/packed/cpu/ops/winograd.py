"""Float 3x3 convolutions on the CPU by Winograd's algorithm, for decoders of first stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidm_cli.packed.cpu.codegen.isa import FLOAT_TILES, instruction_set
from bidm_cli.packed.cpu.ops import kernels
from bidm_cli.packed.cpu.ops.structs import (
    OUTPUTS,
    POINTS,
    WINOGRAD_ARGS,
    WINOGRAD_TILES,
    WINOGRAD_WEIGHTS_ARGS,
)
from bidm_cli.packed.cpu.runtime.args import record
from bidm_cli.packed.cpu.runtime.kernels import launcher_of
from bidm_cli.packed.cpu.runtime.threads import ELEMENTS, most_threads
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES

FEWEST_PIXELS = 1024
"""Pixels of the result from which on the transformed weights pay, on a machine with AVX2."""


def takes(conv: nn.Conv2d) -> bool:
    """True for a convolution that :func:`winograd` computes: 3x3, the same size, in channels by 32."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    same = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return same and conv.in_channels % 32 == 0 and conv.out_channels % 32 == 0


def winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, repeat: int = 1, residual: Tensor | None = None
) -> Tensor:
    """residual + 3x3 convolution of x, upsampled ``repeat`` times, + bias.

    Args (all float32):
        x: [N, H / repeat, W / repeat, C], contiguous. weight: [O, C, 3, 3], channels_last. bias: [O].
        residual: as the result [N, H, W, O], contiguous.
    """
    images, height, width, channels = x.shape
    height, width, out_channels = height * repeat, width * repeat, weight.shape[0]
    out = torch.empty(images, height, width, out_channels)
    threads, tiles = torch.get_num_threads(), WINOGRAD_TILES * FLOAT_TILES[instruction_set()].rows
    # Planes a power of two apart would fall on the same lines of a cache.
    point = channels * out_channels + 16
    kept = {
        "weights": WORKSPACES.numbers("winograd weights", POINTS * point),
        "inputs": WORKSPACES.numbers("winograd inputs", threads * POINTS * tiles * channels),
        "products": WORKSPACES.numbers("winograd products", threads * POINTS * tiles * out_channels),
        "zeros": WORKSPACES.zeros(channels),
    }
    sizes = {"channels": channels, "out_channels": out_channels, "point": point}
    places = {"weights": weight.data_ptr(), "transformed": kept["weights"].data_ptr()}
    values = {
        **sizes,
        **{name: place.data_ptr() for name, place in kept.items()},
        "x": x.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
        "residual": 0 if residual is None else residual.data_ptr(),
        "out": out.data_ptr(),
        "images": images,
        "height": height,
        "width": width,
        "repeat": repeat,
    }
    transform, convolve = map(launcher_of, kernels.winograd())
    args = record(WINOGRAD_WEIGHTS_ARGS, {**sizes, **places})
    transform(args.ctypes.data, most_threads(weight.numel(), ELEMENTS), (args, kept, weight))
    args = record(WINOGRAD_ARGS, values)
    count = images * -(-height // OUTPUTS) * -(-width // OUTPUTS)
    convolve(args.ctypes.data, -(-count // tiles), (args, kept, bias))
    return out
