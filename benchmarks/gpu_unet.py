"""One step of the LDM-4 network on a GPU: packed against bfloat16 with torch.compile.

    python benchmarks/gpu_unet.py
    python benchmarks/gpu_unet.py --config model.yaml --recipe w1a1 --batches 1 64 --no-compile

Random weights, which timings do not depend on. Float side: bfloat16, channels last, torch.compile. Both sides
run in CUDA graphs. Peak memory is a side's weights and what a step allocates at most. The recipe says how
many activation planes a layer has.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import TYPES, describe_gpu, graphed, microseconds, options_of, require_gpu, write_rows

from bidm_cli.checkpoints.open import load_architecture
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.packed.precision import compute_in
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench.models import paired

LDM4 = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    timesteps: 1000
    image_size: 64
    channels: 3
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 64
        in_channels: 3
        out_channels: 3
        model_channels: 224
        attention_resolutions: [8, 4, 2]
        num_res_blocks: 2
        channel_mult: [1, 2, 3, 4]
        num_head_channels: 32
"""
"""The architecture of the published LSUN-Bedrooms network."""


def inputs(model: DiffusionModel, batch: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Inputs of a step: x, t, context and y of a batch in ``dtype``."""
    x = torch.randn(batch, *model.sample_shape, device=device, dtype=dtype)
    t = torch.full((batch,), 500, device=device)
    labels = None if model.num_classes is None else torch.zeros(batch, dtype=torch.long)
    context, y = model.embed_labels(labels)
    return x, t, None if context is None else context.to(dtype), y


def float_step(model: DiffusionModel, batch: int, compiled: bool, device: str = "cuda") -> Callable[[], Any]:
    """The original network in bfloat16; its connections do not exist."""
    x, t, context, y = inputs(model, batch, torch.bfloat16, device)
    x = x.contiguous(memory_format=torch.channels_last)
    unet: Any = torch.compile(model.unet, mode="max-autotune-no-cudagraphs") if compiled else model.unet
    time = model.network_time(t)
    return lambda: unet(x, time, context, y)


def packed_step(model: DiffusionModel, batch: int, device: str = "cuda") -> Callable[[], Any]:
    """The packed network, with features of a step before, as in the middle of a sampling."""
    x, t, context, y = inputs(model, batch, torch.float32, device)
    carried: dict[str, torch.Tensor] = {}
    model.denoise(x, t, context, y, carried)
    return lambda: model.denoise(x, t, context, y, dict(carried))


def peak_of(step: Callable[[], Any]) -> int:
    """Bytes that a step allocates at most, beyond what is there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    original: DiffusionModel, packed: DiffusionModel, batch: int, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Milliseconds and peak memory of both sides."""
    steps = [float_step(original, batch, compiled), packed_step(packed, batch)]
    for step in steps:
        step()  # compile, choose algorithms, load kernels
    float_weights = bytes_of(original)
    # What else is on the device is the packed network's: bits, and what its kernels derive from them.
    weights = [float_weights, torch.cuda.memory_allocated() - float_weights]
    own = [size + peak_of(step) for size, step in zip(weights, steps, strict=True)]
    times = microseconds([graphed(step) for step in steps], rounds)
    return {
        "batch": batch,
        "bfloat16_ms": times[0] / 1e3,
        "packed_ms": times[1] / 1e3,
        "ratio": times[0] / times[1],
        "bfloat16_mib": own[0] / 2**20,
        "packed_mib": own[1] / 2**20,
    }


def bytes_of(model: DiffusionModel) -> int:
    """Weights of the network."""
    return sum(tensor.nbytes for tensor in (*model.unet.parameters(), *model.unet.buffers()))


def main() -> None:
    """Time the networks and print the table."""
    arguments = options_of(
        __doc__,
        "gpu_unet",
        config={"type": Path, "help": "another network's configuration"},
        recipe={"default": "w1a1"},
        no_compile={"action": "store_true"},
    )
    require_gpu()
    torch.backends.cudnn.benchmark = True
    found = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "ldm4.yaml").write_text(LDM4)
        model = load_architecture(arguments.config or folder / "ldm4.yaml")
        recipe = Recipe.load(arguments.recipe)
        pair = stack.enter_context(paired(model, recipe=recipe, device="cuda", backend="cupy"))
        stack.enter_context(torch.no_grad())
        pair.float_model.unet.to(torch.bfloat16, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if arguments.type != "float32":
            compute_in(pair.packed, TYPES[arguments.type])
        print(f"{describe_gpu()}; one step; packed floats {arguments.type}\n")
        print(f"{'batch':>5} {'bf16 ms':>9} {'packed ms':>9} {'ratio':>6} {'bf16 MiB':>9} {'packed MiB':>10}")
        for batch in arguments.batches:
            row = measure(pair.float_model, pair.packed, batch, arguments.rounds, not arguments.no_compile)
            found.append(row)
            times = f"{row['bfloat16_ms']:9.3f} {row['packed_ms']:9.3f} {row['ratio']:6.2f}"
            print(f"{batch:5} {times} {row['bfloat16_mib']:9.0f} {row['packed_mib']:10.0f}", flush=True)
    write_rows(arguments, "steps", found)


if __name__ == "__main__":
    main()
