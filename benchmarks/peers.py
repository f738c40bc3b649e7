"""One step against what a user with a CPU would pick: torch float32, OpenVINO float32, bfloat16 and int8.

    python benchmarks/peers.py --threads 2            # prints the table
    python benchmarks/peers.py --threads 2 --write    # and writes results/peers.md, and rows to peers.jsonl

The networks have random weights, which timings do not depend on; the sides are those of `bidm bench --against
openvino`, which alternate in one run; medians. With --cache the int8 models are kept in a folder, so that a
second run only measures (--prepare only makes them).
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import calm_openmp  # noqa: F401
import torch
from cpu_unet import markdown
from random_models import NETWORKS, model_of
from record import RESULTS, record

from bidm_cli.cli.threads import available_cores, use_threads
from bidm_cli.packed.cpu.codegen.isa import cpu_model, instruction_set
from bidm_cli.packed.uses import Products
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.sections import Attention
from bidm_cli.report.bench.models import paired
from bidm_cli.report.bench.openvino import openvino_engines
from bidm_cli.report.bench.result import BenchResult
from bidm_cli.report.bench.timing import BenchOptions, bench
from bidm_cli.report.pages.tables import Table, ratio_text, seconds_text

PAGE = RESULTS / "peers.md"
CASES: dict[str, tuple[str, str, Products]] = {
    "LDM-4 LSUN-Bedrooms w1a1": ("LDM-4 LSUN-Bedrooms", "w1a1", "float32"),
    "LDM-4 LSUN-Bedrooms w1a1, bfloat16 attention": ("LDM-4 LSUN-Bedrooms", "w1a1", "bfloat16"),
    "LDM-4 LSUN-Bedrooms w1a2": ("LDM-4 LSUN-Bedrooms", "w1a2", "float32"),
    "LSUN-Churches w1a1": ("LSUN-Churches", "w1a1", "float32"),
    "LSUN-Churches w1a1, bfloat16 attention": ("LSUN-Churches", "w1a1", "bfloat16"),
    "DDPM CIFAR-10 w1a1": ("DDPM CIFAR-10", "w1a1", "float32"),
    "DDPM CIFAR-10 w1a1, bfloat16 attention": ("DDPM CIFAR-10", "w1a1", "bfloat16"),
}
"""Network, recipe, precision of attention's products (on machines with a matrix unit for it)."""
SIDES = ("OpenVINO float32", "OpenVINO bfloat16", "OpenVINO int8")


def measured(name: str, chosen: argparse.Namespace) -> BenchResult:
    """A network's steps, as `bidm bench` times them."""
    network, recipe, products = CASES[name]
    form = replace(Recipe.load(recipe), attention=Attention(products=products))
    options = BenchOptions(
        chosen.batch_size, 0, chosen.rounds, False, False, "openvino", int8_file(network, chosen)
    )
    with paired(model_of(*NETWORKS[network]), None, form) as pair:
        return bench(pair, options, say=lambda line: print(f"... {name}: {line}", file=sys.stderr))


def int8_file(network: str, chosen: argparse.Namespace) -> Path | None:
    """File of a network's int8 model."""
    name = f"{network.replace(' ', '-')}-batch-{chosen.batch_size}-int8.xml"
    return None if chosen.cache is None else chosen.cache / name


def prepare(chosen: argparse.Namespace) -> None:
    """Make the int8 models."""
    chosen.cache.mkdir(parents=True, exist_ok=True)
    for network in dict.fromkeys(CASES[name][0] for name in chosen.cases):
        print(f"... {network}", file=sys.stderr)
        model = model_of(*NETWORKS[network])
        kept = int8_file(network, chosen)
        left_out = openvino_engines(model, chosen.batch_size, precisions=["int8"], kept=kept).left_out
        for side, reason in left_out.items():
            print(f"... {side} is left out: {reason}", file=sys.stderr)


def sides_of(result: BenchResult) -> dict[str, float]:
    """Median seconds of each side's step."""
    engines = {name: timing.float_seconds for name, timing in result.engines.items()}
    return {"packed": result.step.packed_seconds, "torch float32": result.step.float_seconds, **engines}


def table(results: dict[str, BenchResult]) -> Table:
    """One row per network: each side's step, and how many times the packed one it is."""
    rows: list[Sequence[str]] = []
    for name, result in results.items():
        sides = sides_of(result)
        cells = [seconds_text(sides["packed"])]
        for side in ("torch float32", *SIDES):
            found = sides.get(side)
            ratio = "" if found is None else ratio_text(found / sides["packed"])
            reason = result.machine["engine"]["left_out"].get(side, "")
            cells.append(reason if found is None else f"{seconds_text(found)}, {ratio}")
        rows.append([f"{name}, batch {result.batch_size}", *cells])
    return Table("One step", ["network", "packed", "torch float32", *SIDES], rows)


def numbers_of(result: BenchResult) -> dict[str, Any]:
    """Numbers of a network's JSON row."""
    packed = result.step.packed_seconds
    seconds = {f"{name} seconds": value for name, value in sides_of(result).items()}
    ratios = {f"{name} / packed": median(t.float_rounds) / packed for name, t in result.engines.items()}
    return {**seconds, "torch float32 / packed": result.step.ratio, **ratios}


def main() -> None:
    """Time the networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache", type=Path, help="folder for int8 models")
    parser.add_argument("--prepare", action="store_true", help="make the int8 models in --cache, no more")
    parser.add_argument("--write", action="store_true", help=f"also write {PAGE} and its rows")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    if chosen.prepare:
        prepare(chosen)
        return
    results = {name: measured(name, chosen) for name in chosen.cases}
    engine = next(iter(results.values())).machine["engine"]
    machine = (
        f"{datetime.date.today()}: {cpu_model()} ({instruction_set()}), threads: {chosen.threads}, "
        f"rounds: {chosen.rounds}; torch "
        f"{torch.__version__}, OpenVINO {engine['openvino']}; int8 by nncf {engine['nncf']}, calibrated on "
        f"{engine['calibration']}; random weights; all sides in turn in one process, medians."
    )
    print(f"\n{machine}\n\n{table(results).to_text()}")
    if chosen.write:
        command = shlex.join(["python", *sys.argv])
        title = "One step against other engines on a CPU"
        PAGE.write_text(markdown(title, machine, command, [table(results)]), encoding="utf-8")
        numbers = {name: numbers_of(result) for name, result in results.items()}
        record(PAGE.with_suffix(".jsonl"), numbers, threads=chosen.threads)


if __name__ == "__main__":
    main()
