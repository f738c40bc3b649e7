"""Profile of a packed CPU step, per kind of work.

    python benchmarks/cpu_profile.py                    # LDM-4 LSUN-Bedrooms, DDPM CIFAR-10, a digits network
    python benchmarks/cpu_profile.py --threads 1

The step is captured, as the sampler does it (bidm_cli/packed/recording/cpu_graph.py), and each item is timed
on its own: a kernel's launch, or what torch computes. Each is the median of the rounds. "Whole step" is the
captured step replayed: what it lacks to the sum is what launching each kernel alone costs. "Called plainly"
is the same network without a capture. Weights are random: timings do not depend on them.
"""

from __future__ import annotations

import argparse
import platform
from collections import defaultdict
from statistics import median

import calm_openmp  # noqa: F401
import torch
from random_models import NETWORKS, model_of
from record import add_record_option, record

from bidm_cli.cli.threads import available_cores
from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.packed.cpu.runtime.kernels import kernel_name
from bidm_cli.packed.cpu.runtime.sequence import KernelSequence
from bidm_cli.packed.cpu.runtime.threads import description
from bidm_cli.packed.recording.cpu_graph import CpuRecorder
from bidm_cli.packed.recording.denoiser import RecordedDenoiser
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench.models import paired
from bidm_cli.report.bench.step import step_call, timed, warm_up

BATCHES = {"LDM-4 LSUN-Bedrooms": 1, "DDPM CIFAR-10": 1, "digits": 32}


def parts(denoiser: RecordedDenoiser, rounds: int) -> dict[str, tuple[int, float]]:
    """Per kind of work: count in a step, and the seconds of all together."""
    (shape,) = denoiser._shapes.values()
    recorded = list(shape.recordings.values())[-1]
    assert recorded is not None and recorded.replay is not None
    works = [
        (kernel_name(work.kernel), KernelSequence([work]).run)
        if isinstance(work, tuple)
        else (work.__name__, work)
        for work in recorded.replay.__self__.work  # type: ignore[attr-defined]
    ]
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for (_, run), found in zip(works, times, strict=True):
            found.append(timed(run))
    total: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for (name, _), found in zip(works, times, strict=True):
        count, so_far = total[name]
        total[name] = count + 1, so_far + median(found)
    return total


def show(name: str, batch: int, rounds: int) -> dict[str, float]:
    """Print the table of a network, and return its seconds by part."""
    with paired(model_of(*NETWORKS[name]), recipe=Recipe.load("w1a1")) as pair, torch.no_grad():
        plain = step_call(pair.packed, batch, plain=True)
        warm_up(plain)
        denoiser = RecordedDenoiser(pair.packed, CpuRecorder())
        x, t, carried = torch.randn(batch, *pair.packed.sample_shape), torch.full((batch,), 500), {}

        def step() -> torch.Tensor:
            return denoiser(x, t, None, None, carried)

        warm_up(step)
        found = parts(denoiser, rounds)
        whole, called = (median(timed(call) for _ in range(rounds)) for call in (step, plain))
    print(f"\n## {name}, batch {batch}\n\n| part | count | ms | share |\n|---|---|---|---|")
    for part, (count, value) in sorted(found.items(), key=lambda item: -item[1][1]):
        print(f"| {part} | {count} | {1e3 * value:.2f} | {100 * value / whole:.1f} % |")
    steps = {"whole step": whole, "called plainly": called}
    for part, value in steps.items():
        print(f"| {part} | | {1e3 * value:.2f} | {100 * value / whole:.1f} % |")
    return steps | {part: value for part, (_, value) in found.items()}


def main() -> None:
    """Time the parts of a step and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=available_cores())
    add_record_option(parser, "cpu_profile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.platform()}, {instruction_set()}, torch {torch.__version__}, {description()}")
    shown = {f"{name}, batch {batch}": show(name, batch, options.rounds) for name, batch in BATCHES.items()}
    if options.record:
        record(options.record, shown, threads=options.threads)


if __name__ == "__main__":
    main()
