"""Where the time of a packed CPU step goes, part by part.

    python benchmarks/cpu_profile.py                    # LDM-4 LSUN-Bedrooms, DDPM CIFAR-10, a digits network
    python benchmarks/cpu_profile.py --threads 1

The step is recorded, as the sampler does it (bidm_cli/packed/recording/cpu_graph.py), and each thing it does is timed
on its own: a kernel's launch, or what torch computes. Each is the median of the rounds. "Whole step" is the
recording replayed: what it lacks to the sum is what launching each kernel alone costs. "Called plainly" is
the same network without a recording. Weights are random: timings do not depend on them.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import calm_openmp  # noqa: F401
import torch

from bidm_cli.cli.threads import available_cores
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.registry import build
from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.packed.cpu.runtime.threads import description
from bidm_cli.packed.recording.cpu_graph import CpuRecorder
from bidm_cli.packed.recording.denoiser import RecordedDenoiser
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench.models import paired
from bidm_cli.report.bench.step import step_call, warm_up

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


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def parts(denoiser: RecordedDenoiser, rounds: int) -> dict[str, tuple[int, float]]:
    """By kind of work: how often it occurs in a later step of a sampling, and the seconds of all together."""
    (shape,) = denoiser._shapes.values()
    recorded = shape.recordings[True]
    assert recorded.replay is not None
    works = recorded.replay.each()  # type: ignore[attr-defined]
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for (_, run), found in zip(works, times, strict=True):
            found.append(seconds(run))
    total: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for (name, _), found in zip(works, times, strict=True):
        count, so_far = total[name]
        total[name] = count + 1, so_far + median(found)
    return total


def show(
    name: str, batch: int, architecture: dict[str, Any], shape: tuple[int, int, int], rounds: int
) -> None:
    """The table of a network."""
    with paired(network(architecture, shape), recipe=Recipe.load("w1a1")) as pair, torch.no_grad():
        plain = step_call(pair.packed, batch, plain=True)
        warm_up(plain)
        denoiser = RecordedDenoiser(pair.packed, CpuRecorder())
        x, t, memory = torch.randn(batch, *shape), torch.full((batch,), 500), {}

        def step() -> torch.Tensor:
            return denoiser(x, t, None, None, memory)

        warm_up(step)
        found = parts(denoiser, rounds)
        whole, called = (median(seconds(call) for _ in range(rounds)) for call in (step, plain))
    print(f"\n## {name}\n\n| part | count | ms | share |\n|---|---|---|---|")
    for part, (count, value) in sorted(found.items(), key=lambda item: -item[1][1]):
        print(f"| {part} | {count} | {1e3 * value:.2f} | {100 * value / whole:.1f} % |")
    for part, value in (("whole step", whole), ("called plainly", called)):
        print(f"| {part} | | {1e3 * value:.2f} | {100 * value / whole:.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.platform()}, {instruction_set()}, torch {torch.__version__}, {description()}")
    for name, (architecture, shape, batch) in NETWORKS.items():
        show(name, batch, architecture, shape, options.rounds)


if __name__ == "__main__":
    main()
