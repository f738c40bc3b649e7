"""Where the time of a packed CPU step goes, part by part.

    python benchmarks/cpu_profile.py                    # LDM-4 LSUN-Bedrooms, DDPM CIFAR-10, a digits network

One thread, and the time it has spent computing, so that a busy machine disturbs little. Kernels are timed
around their launch, torch's operations by torch's profiler; what is left of the whole step is Python. Each is
the median of the rounds. Weights are random: timings do not depend on them.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler import profile

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel, Memory
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.registry import build
from bidm_cli.packed.cpu import attention, norm, plan
from bidm_cli.packed.cpu.isa import instruction_set
from bidm_cli.packed.cpu.team import description
from bidm_cli.packed.load import PackedModel
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench_models import paired

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int, int], int]] = {
    "LDM-4 LSUN-Bedrooms, batch 1": (
        {
            "kind": "ldm_unet",
            "args": {
                "in_channels": 3,
                "out_channels": 3,
                "model_channels": 224,
                "attention_resolutions": [8, 4, 2],
                "num_res_blocks": 2,
                "channel_mult": [1, 2, 3, 4],
                "num_head_channels": 32,
            },
        },
        (3, 64, 64),
        1,
    ),
    "DDPM CIFAR-10, batch 1": (
        {
            "kind": "ddpm_unet",
            "args": {
                "in_channels": 3,
                "out_channels": 3,
                "ch": 128,
                "ch_mult": [1, 2, 2, 2],
                "num_res_blocks": 2,
                "attention_levels": [1],
            },
        },
        (3, 32, 32),
        1,
    ),
    "digits, batch 32": (
        {
            "kind": "ddpm_unet",
            "args": {
                "in_channels": 1,
                "out_channels": 1,
                "ch": 64,
                "ch_mult": [1, 2],
                "num_res_blocks": 2,
                "attention_levels": [1],
            },
        },
        (1, 8, 8),
        32,
    ),
}
"""Architecture, sample shape and batch size."""


def network(architecture: dict[str, Any], shape: tuple[int, int, int]) -> DiffusionModel:
    """A float network with random weights."""
    torch.manual_seed(0)
    whole = {"unet": architecture, "first_stage": None, "conditioner": None}
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    return DiffusionModel("ddpm", build(architecture).eval(), shape, schedule, SamplingConvention(), whole)


def step_of(model: PackedModel, batch: int) -> Callable[[], torch.Tensor]:
    """One denoising step, with the features of the step before."""
    x = torch.randn(batch, *model.sample_shape)
    t = torch.full((batch,), 500)
    memory: Memory = {}
    return lambda: model.denoise(x, t, None, None, memory)


@contextmanager
def timed_kernels(seconds: dict[str, float]) -> Iterator[None]:
    """While open, each kernel's launches add their time to ``seconds``."""

    def timed(name: Callable[..., str], launch: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            began = time.thread_time()
            result = launch(*arguments, **more)
            seconds[name(*arguments)] += time.thread_time() - began
            return result

        return call

    def products(own: plan.ConvPlan, *_: Any) -> str:
        geometry = own.weights.geometry
        what = "layers" if geometry.kind == "linear" else "x".join(map(str, geometry.kernel))
        return f"{geometry.kind} {what}: products and epilogue"

    pack = plan.pack_launcher
    patches = (
        (plan.ConvPlan, "convolve", timed(products, plan.ConvPlan.convolve)),
        (plan, "pack_launcher", lambda form: timed(lambda *_: f"packing ({form})", pack(form))),
        (norm, "pack_launcher", lambda form: timed(lambda *_: "norms applied alone", pack(form))),
        (norm.NormPlan, "run", timed(lambda *_: "norm statistics", norm.NormPlan.run)),
        (attention.AttentionPlan, "run", timed(lambda *_: "attention", attention.AttentionPlan.run)),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


def parts(step: Callable[[], Any], rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of the whole step and of its parts, each the median of the rounds."""
    whole = median(_seconds(step) for _ in range(rounds))
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        seconds: dict[str, float] = defaultdict(float)
        with timed_kernels(seconds):
            step()
        with profile() as torchs:
            step()
        for event in torchs.key_averages():
            seconds[f"torch: {event.key.removeprefix('aten::')}"] += event.self_cpu_time_total / 1e6
        for name, value in seconds.items():
            found[name].append(value)
    return whole, {name: median(values) for name, values in found.items()}


def _seconds(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def show(whole: float, found: dict[str, float], least: float = 0.005) -> None:
    """A table of the parts that take more than ``least`` of the step."""
    print("| part | ms | share |\n|---|---|---|")
    rest = 0.0
    for name, seconds in sorted(found.items(), key=lambda item: -item[1]):
        if seconds < least * whole:
            rest += seconds
        else:
            print(f"| {name} | {1e3 * seconds:.2f} | {100 * seconds / whole:.1f} % |")
    python = whole - sum(found.values())
    for name, seconds in (("torch: the rest", rest), ("Python", python), ("whole step", whole)):
        print(f"| {name} | {1e3 * seconds:.2f} | {100 * seconds / whole:.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.platform()}, {instruction_set()}, torch {torch.__version__}, {description()}")
    recipe = Recipe.load("w1a1")
    for name, (architecture, shape, batch) in NETWORKS.items():
        with paired(network(architecture, shape), recipe=recipe) as pair, torch.inference_mode():
            step = step_of(pair.packed, batch)
            for _ in range(3):
                step()
            print(f"\n## {name}\n")
            show(*parts(step, options.rounds))


if __name__ == "__main__":
    main()
