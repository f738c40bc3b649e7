"""Binary layers of the LDM-4 network on a GPU, each against cuDNN in bfloat16.

    python benchmarks/gpu_layers.py
    python benchmarks/gpu_layers.py --batches 64 --check --json layers.json
    python benchmarks/gpu_layers.py --planes 2

For every shape and batch: group norm, SiLU and the convolution, once in torch (bfloat16, channels last,
cuDNN's fastest algorithm), once packed (statistics, norm with binarizing and packing, convolution with its
epilogue). Both sides run in CUDA graphs over inputs that do not fit into the cache. ``--check`` compares each
packed layer with the torch backend first; ``--planes`` gives its activations several planes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import (
    TYPES,
    copies_beyond_cache,
    describe_gpu,
    graphed,
    microseconds,
    options_of,
    require_gpu,
    write_rows,
)
from random_models import packed_from
from torch import Tensor, nn

from bidm_cli.networks.fusion import Fused, Prologue
from bidm_cli.packed.backends.cupy import CupyBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.recipe.spec import MOST_PLANES, BinarySpec


@dataclass(frozen=True)
class Shape:
    """A convolution of the network: size of its input, channels, filters, kernel, stride."""

    size: int
    channels: int
    filters: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.channels}->{self.filters} @{self.size}"


LDM4 = [
    Shape(64, 224, 224),
    Shape(64, 448, 224),
    Shape(64, 672, 224),
    Shape(32, 448, 448),
    Shape(32, 1120, 448),
    Shape(16, 672, 672),
    Shape(16, 1568, 672),
    Shape(8, 896, 896),
    Shape(8, 1792, 896),
    Shape(64, 224, 224, stride=2),
    Shape(64, 448, 224, kernel=1),
    Shape(32, 448, 1344, kernel=1),
]


def measure(
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    rounds: int,
    check: bool,
    planes: int = 1,
    device: str = "cuda",
) -> dict[str, Any]:
    """Microseconds of both sides for one shape and batch."""
    torch.manual_seed(0)
    conv = nn.Conv2d(shape.channels, shape.filters, shape.kernel, shape.stride, shape.kernel // 2)
    norm = nn.GroupNorm(32, shape.channels).to(device).requires_grad_(False)
    layer = packed_from(conv, BinarySpec(planes=planes)).to(device)
    prologue, backend = Prologue(norm, silu=True), CupyBackend()
    x = torch.randn(batch, shape.channels, shape.size, shape.size, device=device)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    if check:
        assert_agrees(backend, layer, x, prologue)

    half = conv.to(device, torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    half_norm = nn.GroupNorm(32, shape.channels).to(device, torch.bfloat16).requires_grad_(False)
    copies = copies_beyond_cache(x)
    copies_half = [value.to(torch.bfloat16) for value in copies]

    def float_side() -> None:
        for value in copies_half:
            half(F.silu(half_norm(value)))

    def packed_side() -> None:
        for value in copies:
            backend.run(layer.tensors, value, Fused(prologue))

    sides = [graphed(float_side), graphed(packed_side)]
    float_time, packed_time = microseconds(sides, rounds, calls=len(copies))
    return {
        "layer": str(shape) if planes == 1 else f"{shape}, {planes} planes",
        "batch": batch,
        "bfloat16_us": float_time,
        "packed_us": packed_time,
        "ratio": float_time / packed_time,
        "kernel": backend.kernel(layer.geometry, planes),
    }


def assert_agrees(backend: CupyBackend, layer: PackedLayer, x: Tensor, prologue: Prologue) -> None:
    """Only signs next to a threshold may differ from the reference's, and results by what that makes."""
    reference = TorchBackend()
    expected = reference.run(layer.tensors, x.float(), Fused(prologue))
    flipped = (
        (
            backend.signs(layer.tensors, x, Fused(prologue))
            != reference.signs(layer.tensors, x.float(), Fused(prologue))
        )
        .float()
        .mean()
    )
    error = (backend.run(layer.tensors, x, Fused(prologue)).float() - expected).norm() / expected.norm()
    if flipped > 1e-3 or error > 0.05:
        raise SystemExit(
            f"wrong results: {float(flipped):.1e} of the signs flipped, error {float(error):.2e}"
        )


def main() -> None:
    """Time the layers and print the table."""
    planes = {"type": int, "choices": range(1, MOST_PLANES + 1), "default": 1}
    arguments = options_of(__doc__, "gpu_layers", check={"action": "store_true"}, planes=planes)
    require_gpu()
    torch.backends.cudnn.benchmark = True
    print(f"{describe_gpu()}; norm, SiLU, conv; packed activations {arguments.type}\n")
    print(f"{'layer':38} {'batch':>5} {'bf16 us':>9} {'packed us':>9} {'ratio':>6}  kernel")
    found = []
    with torch.no_grad():
        for shape in LDM4:
            for batch in arguments.batches:
                options = (TYPES[arguments.type], arguments.rounds, arguments.check, arguments.planes)
                row = measure(shape, batch, *options)
                found.append(row)
                times = f"{row['bfloat16_us']:9.1f} {row['packed_us']:9.1f} {row['ratio']:6.2f}"
                print(f"{row['layer']:38} {batch:5} {times}  {row['kernel']}", flush=True)
    write_rows(arguments, "layers", found)


if __name__ == "__main__":
    main()
