"""Packed against float on a CPU: three published networks, and how a step grows with batch and pixels.

    python benchmarks/cpu_unet.py                      # prints the tables
    python benchmarks/cpu_unet.py --threads 2 --write  # and writes benchmarks/results/cpu_unet.md and .jsonl
    python benchmarks/cpu_unet.py --planes 2           # instead: steps of one plane against those of two

Random weights, which timings do not depend on. Float is torch in float32 in the better of its memory formats;
both sides alternate in one run, medians are compared. Peak memory is of one process per side, above its
imports.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import calm_openmp  # noqa: F401
import torch
from random_models import NETWORKS, model_of
from record import RESULTS, record

from bidm_cli.cli.threads import available_cores, use_threads
from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.sections import Rule
from bidm_cli.report.bench.models import Pair, paired
from bidm_cli.report.bench.result import BenchResult
from bidm_cli.report.bench.step import step_call, time_in_turn, warm_up
from bidm_cli.report.bench.tables import kind_table
from bidm_cli.report.bench.timing import BenchOptions, alternate, attention_timings, bench
from bidm_cli.report.pages.tables import Table, bytes_text, ratio_text, seconds_text

PUBLISHED = ("LDM-4 LSUN-Bedrooms", "LSUN-Churches", "DDPM CIFAR-10")
PAGE = RESULTS / "cpu_unet.md"


def overview(results: dict[str, BenchResult]) -> Table:
    """One row per network: one step and peak memory."""
    rows: list[Sequence[str]] = []
    for name, result in results.items():
        step, (low, high) = result.step, result.step.spread
        row = [f"{name}, batch {result.batch_size}", seconds_text(step.float_seconds)]
        row += [seconds_text(step.packed_seconds), ratio_text(step.ratio)]
        row.append(f"{ratio_text(low)} to {ratio_text(high)}")
        if result.memory is not None:
            before, after = result.memory["float_bytes"], result.memory["packed_bytes"]
            row += [bytes_text(before), bytes_text(after), ratio_text(before / max(1, after))]
        rows.append(row)
    columns = ["one step", "float", "packed", "ratio", "spread"]
    if all(result.memory is not None for result in results.values()):
        columns += ["memory, float", "memory, packed", "ratio"]
    return Table("Whole networks", columns, rows)


def row(result: BenchResult) -> dict[str, float]:
    """Numbers of a network's JSON row."""
    step = result.step
    numbers = {
        "float_seconds": step.float_seconds,
        "packed_seconds": step.packed_seconds,
        "ratio": step.ratio,
    }
    memory = result.memory or {}
    return numbers | {key: memory[key] for key in ("float_bytes", "packed_bytes") if key in memory}


@torch.inference_mode()
def scaling(pair: Pair, batches: Sequence[int], sides: Sequence[int], rounds: int) -> Table:
    """One step at other batch sizes, and at other sizes of the input with batch 1."""
    native = pair.packed.sample_shape[1]
    shapes = [(batch, native) for batch in batches] + [(1, side) for side in sides if side != native]
    rows: list[Sequence[str]] = []
    base: tuple[float, float] | None = None
    for batch, side in [(1, native), *(shape for shape in shapes if shape != (1, native))]:
        sized = _resized(pair, side)
        calls = [step_call(model, batch) for model in (sized.float_model, sized.packed)]
        for call in calls:
            warm_up(call)
        timing = alternate({"float": calls[0]}, calls[1], rounds)
        # An image's products take the same time whatever the batch.
        attention = batch * sum(
            len(layer.names) * layer.timing.packed_seconds
            for layer in attention_timings(sized, step_call(sized.packed, 1, plain=True), rounds)
        )
        each = tuple(
            seconds / (batch * side**2)
            for seconds in (timing.packed_seconds, timing.packed_seconds - attention)
        )
        base = base or each
        times = seconds_text(timing.float_seconds), seconds_text(timing.packed_seconds)
        shares = [f"{now / first:.2f}" for now, first in zip(each, base, strict=True)]
        rows.append((str(batch), f"{side}x{side}", *times, ratio_text(timing.ratio), *shares))
    columns = ["batch", "pixels", "float", "packed", "ratio", "time per pixel", "without attention"]
    note = (
        f"Time per pixel of the packed network is relative to batch 1 at {native}x{native}: 1.00 is linear. "
        "The last column is without attention's products, which grow with the square of the pixels."
    )
    return Table("One step against batch and pixels", columns, rows, frozenset(), note=note)


def with_planes(recipe: Recipe, planes: int) -> Recipe:
    """The recipe with so many activation planes in every layer that has binary activations."""

    def changed(rule: Rule) -> Rule:
        spec = rule.binarize
        if spec is None or spec.activations == "float":
            return rule
        return dataclasses.replace(rule, binarize=dataclasses.replace(spec, planes=planes))

    return dataclasses.replace(recipe, layers=tuple(map(changed, recipe.layers)))


@torch.inference_mode()
def planes_table(names: Sequence[str], recipe: Recipe, planes: int, rounds: int) -> Table:
    """One step with one activation plane and with several, alternating."""
    rows: list[Sequence[str]] = []
    for name in names:
        with contextlib.ExitStack() as opened:
            model, recipes = model_of(*NETWORKS[name]), [with_planes(recipe, n) for n in (1, planes)]
            calls = [step_call(opened.enter_context(paired(model, recipe=r)).packed, 1) for r in recipes]
            for call in calls:
                warm_up(call)
            times = time_in_turn({"one": calls[0], "several": calls[1]}, rounds)
        ratios = sorted(several / one for one, several in zip(times["one"], times["several"], strict=True))
        row = [f"{name}, batch 1", *(seconds_text(median(found)) for found in times.values())]
        middle, low, high = (ratio_text(ratio) for ratio in (median(ratios), ratios[0], ratios[-1]))
        rows.append([*row, middle, f"{low} to {high}"])
    columns = ["one step", "1 plane", f"{planes} planes", "ratio", "spread"]
    return Table("Activation planes", columns, rows)


def _resized(pair: Pair, side: int) -> Pair:
    """The same networks for another height and width."""
    models = [copy.copy(model) for model in (pair.float_model, pair.packed)]
    for model in models:
        model.sample_shape = (model.sample_shape[0], side, side)
    return dataclasses.replace(pair, float_model=models[0], packed=models[1])


def markdown(title: str, machine: str, command: str, tables: Sequence[Table]) -> str:
    """The results' page."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    parts = [f"# {title}\n", f"`{command}`\n", machine + "\n"]
    for table in tables:
        rows = [line(table.columns), "|" + "---|" * len(table.columns), *map(line, table.rows)]
        parts += [f"## {table.title}\n", "\n".join(rows) + "\n"]
        parts += [table.note + "\n"] if table.note else []
    return "\n".join(parts)


def describe(result: BenchResult, rounds: int) -> str:
    """Machine, versions and date in a sentence."""
    on = result.machine
    return (
        f"{on['date']}: {on['device']} ({instruction_set()}), cores: {on['cores']}, threads: "
        f"{on['threads']}; float is torch {on['torch']} in float32 in the better of its memory formats, "
        f"alternating with the packed network in one run; medians over {rounds} rounds, spread over "
        "single rounds; random weights."
    )


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="w1a1")
    parser.add_argument("--networks", nargs="+", choices=PUBLISHED, default=PUBLISHED)
    parser.add_argument("--scaling", choices=[*PUBLISHED, "none"], default="LDM-4 LSUN-Bedrooms")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--sides", nargs="*", type=int, default=[32, 64, 96], help="heights and widths")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-layers", action="store_true", help="leave out the times by kind of layer")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--planes", type=int, help="only compare steps with 1 and with so many planes")
    parser.add_argument("--write", nargs="?", type=Path, const=PAGE, help=f"also write here ({PAGE})")
    return parser.parse_args()


def main() -> None:
    """Time the networks and print the tables."""
    chosen = options()
    use_threads(chosen.threads)
    measured = BenchOptions(
        steps=0, rounds=chosen.rounds, layers=not chosen.no_layers, memory=not chosen.no_memory
    )
    if chosen.planes is not None:
        recipe = Recipe.load(chosen.recipe)
        print(planes_table(chosen.networks, recipe, chosen.planes, chosen.rounds).to_text())
        return
    results: dict[str, BenchResult] = {}
    tables: list[Table] = []
    for name in chosen.networks:
        with paired(model_of(*NETWORKS[name]), None, Recipe.load(chosen.recipe)) as pair:
            results[name] = bench(pair, measured, say=lambda line, name=name: print(f"... {name}: {line}"))
            if results[name].layers:
                tables.append(_named(kind_table(results[name]), name))
            if name == chosen.scaling:
                print(f"... {name}: batch and pixels")
                table = scaling(pair, chosen.batches, chosen.sides, max(3, chosen.rounds // 2))
                tables.append(_named(table, name))
    tables.insert(0, overview(results))
    machine = describe(next(iter(results.values())), chosen.rounds)
    print(f"\n{machine}\n\n" + "\n\n".join(table.to_text() for table in tables))
    if chosen.write is not None:
        page = markdown("Packed against float on a CPU", machine, shlex.join(["python", *sys.argv]), tables)
        chosen.write.write_text(page, encoding="utf-8")
        numbers = {f"{name}, batch {result.batch_size}": row(result) for name, result in results.items()}
        record(chosen.write.with_suffix(".jsonl"), numbers, threads=chosen.threads)
        print(f"\nWritten: {chosen.write}")


def _named(table: Table, name: str) -> Table:
    return dataclasses.replace(table, title=f"{table.title}: {name}")


if __name__ == "__main__":
    main()
