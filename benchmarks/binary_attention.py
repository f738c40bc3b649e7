"""LDM-4 (LSUN-Bedrooms) with binary attention scores against float ones: the products, and a whole step.

    python benchmarks/binary_attention.py

Both networks are packed and run on the numba backend, alternating, in one thread; what counts is the time
that the thread has computed, so that a busy machine disturbs little. Weights are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from random_models import NETWORKS, model_of
from record import add_record_option, record
from torch import nn

from bidm_cli.networks.layers import AttentionProduct
from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench.models import paired
from bidm_cli.report.bench.step import step_call

RECIPES = ("w1a1", "w1a1-attention")


class Watch:
    """Sum of the time that a network spends in its attention products."""

    def __init__(self, network: nn.Module) -> None:
        self.seconds = self._began = 0.0
        for module in network.modules():
            if isinstance(module, AttentionProduct):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.thread_time()

    def _end(self, *_: Any) -> None:
        self.seconds += time.thread_time() - self._began


def timed(call: Callable[[], Any], watch: Watch) -> tuple[float, float]:
    """Seconds of a step, and of its attention products."""
    watch.seconds, began = 0.0, time.thread_time()
    call()
    return time.thread_time() - began, watch.seconds


@torch.inference_mode()
def main() -> None:
    """Time binary against float attention and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    add_record_option(parser, "binary_attention")
    options = parser.parse_args()
    rounds = options.rounds
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in RECIPES}
    with ExitStack() as stack:
        calls = {}
        for name in RECIPES:
            pair = stack.enter_context(
                paired(model_of(*NETWORKS["LDM-4 LSUN-Bedrooms"]), None, Recipe.load(name))
            )
            calls[name] = step_call(pair.packed, 1, plain=True), Watch(pair.packed.unet)
        for index in range(rounds + 2):
            for name, call in calls.items():
                seconds = timed(*call)
                if index >= 2:
                    found[name].append(seconds)
    print(f"{instruction_set()}, 1 thread, {rounds} rounds, medians")
    rows: dict[str, dict[str, float]] = {}
    for part, title in ((1, "attention products"), (0, "whole step")):
        times = {name: [seconds[part] for seconds in found[name]] for name in RECIPES}
        floats, binary = (median(times[name]) for name in RECIPES)
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        print(
            f"{title:20} {1e3 * floats:7.1f} ms float scores {1e3 * binary:7.1f} ms binary scores "
            f"{floats / binary:5.2f}x ({min(ratios):.2f}x to {max(ratios):.2f}x)"
        )
        rows[title] = {
            "float_scores_seconds": floats,
            "binary_scores_seconds": binary,
            "ratio": floats / binary,
        }
    if options.record:
        record(options.record, rows, threads=1)


if __name__ == "__main__":
    main()
