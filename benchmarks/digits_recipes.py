"""Ablation of the method on the bundled digits: one student per variant, equal steps, one seed.

    python benchmarks/digits_recipes.py --steps 600 --variants w1a1 "no connections" xnor

Prints a table, puts it first in benchmarks/results/digits_recipes.md with machine and date, and its rows in
digits_recipes.jsonl. "traj" is the trajectory error (bidm_cli/distill/trajectory.py) of the EMA student over
64 images and 50 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import HERE, RESULTS, record

import bidm_cli
from bidm_cli.binary.surgery import binarize
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.distill.trajectory import trajectory_error
from bidm_cli.recipe import Recipe

DEMO = HERE.parent / "bidm_cli" / "demo"
Change = Callable[[Recipe], Recipe]


def with_layers_of(name: str) -> Change:
    """The digits recipe with the layers, connections and losses of a bundled recipe."""

    def change(recipe: Recipe) -> Recipe:
        other = Recipe.load(name)
        return dataclasses.replace(recipe, layers=other.layers, tbs=other.tbs, distill=other.distill)

    return change


def full_attention(recipe: Recipe) -> Recipe:
    """Scale maps and shortcuts on attention's layers, too."""
    every = dataclasses.replace(recipe.layers[1], roles=("*",))
    return dataclasses.replace(recipe, layers=(recipe.layers[0], every))


VARIANTS: dict[str, Change] = {
    "w1a1": lambda r: r,
    "no connections": lambda r: dataclasses.replace(r, tbs=None),
    "connections start at 0.3": lambda r: r.override("tbs", initial=0.3),
    "connections, same noise": lambda r: r.override("tbs", pair="same_noise"),
    "no SPD": lambda r: r.override("distill", loss="none"),
    "SPD x 10": lambda r: r.override("distill", weight=0.1),
    "target: the noise": lambda r: r.override("distill", target="noise"),
    "maps and shortcuts everywhere": full_attention,
    "lr / 2": lambda r: r.override("train", lr=r.train.lr / 2, lr_binary=r.train.lr_binary / 2),
    "lr x 2": lambda r: r.override("train", lr=r.train.lr * 2, lr_binary=r.train.lr_binary * 2),
    "batch 64": lambda r: r.override("train", batch_size=64),
    "batch 16": lambda r: r.override("train", batch_size=16),
    "xnor": with_layers_of("xnor"),
    "reference": with_layers_of("reference"),
    "w1a32": with_layers_of("w1a32"),
}


def measure(name: str, steps: int, seed: int) -> tuple[float, float, float]:
    """(noise loss at the end, trajectory error, seconds of training) of one variant."""
    teacher = bidm_cli.load_checkpoint(DEMO / "digits.pth")
    recipe = VARIANTS[name](Recipe.load(DEMO / "digits-w1a1.yaml")).override("train", steps=steps)
    student = binarized_copy(teacher)
    binarize(student.unet, recipe, teacher.schedule.timesteps)
    with tempfile.TemporaryDirectory() as folder:
        data = ImageData(teacher, DEMO / "digits.npz")
        trainer = Trainer(teacher, student, recipe, data, Path(folder), seed)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    student.unet = trainer.ema.module
    error = trajectory_error(teacher, student, n=64, steps=50)
    last = trainer.rows[-max(1, len(trainer.rows) // 10) :]
    return sum(row.noise_loss for row in last) / len(last), error["mean"], seconds


def main() -> None:
    """Train with each recipe and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"\n## {datetime.date.today()}: {arguments.steps} steps, seed {arguments.seed}\n\n{where}\n",
        "| variant | noise loss | traj | seconds |",
        "|---|---|---|---|",
    ]
    results = RESULTS / "digits_recipes.md"
    rows: dict[str, dict[str, float]] = {}
    for name in arguments.variants:
        loss, error, seconds = measure(name, arguments.steps, arguments.seed)
        numbers = {"noise_loss": loss, "trajectory_error": error, "seconds": seconds}
        rows[f"{name}, {arguments.steps} steps, seed {arguments.seed}"] = numbers
        lines.append(f"| {name} | {loss:.4f} | {error:.4f} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    title, newest, older = results.read_text(encoding="utf-8").partition("\n## ")
    results.write_text(title + "\n".join(lines) + "\n" + newest + older, encoding="utf-8")
    record(results.with_suffix(".jsonl"), rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
