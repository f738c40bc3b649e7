"""Ablation: students of one checkpoint, each with other parts of the method, trained for the same time.

    python benchmarks/ablation.py train faces --work runs/ablation --seeds 0 1 2
    python benchmarks/ablation.py train faces --work runs/ablation --variants "w1a1 + SPD 0.01" --equal steps
    python benchmarks/ablation.py score faces --work runs/ablation --record

``train`` goes on where it was stopped, and leaves alone what is trained; several of it may run at once. Equal
time is in units of the base recipe's steps: each variant gets as many steps as it does while the base does
``--steps``, by step times measured in turn in one process (``ratios``, to be run first). Variants:
ablation_recipes.py. ``score`` draws ``-n`` samples of all that is trained, keeps the scores, and appends rows
to benchmarks/results/ablation.jsonl; benchmarks/ablation_page.py makes the table of them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from ablation_domains import DOMAINS, Domain
from ablation_recipes import FURTHER, MAIN, VARIANTS
from ablation_score import Judge
from record import RESULTS, record

import bidm_cli
from bidm_cli.binary.surgery import binarize
from bidm_cli.cli.threads import use_threads
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.files import write_atomically
from bidm_cli.recipe import Recipe


def slug(variant: str, seed: int) -> str:
    """File name of a student."""
    return f"{variant.replace(' + ', '+').replace(', ', ',').replace(' ', '_')}-{seed}"


def step_seconds(domain: Domain, variants: list[str], rounds: int) -> dict[str, float]:
    """Median seconds of a training step, all variants in turn."""
    teacher, trainers = bidm_cli.load_checkpoint(domain.checkpoint), {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    with TemporaryDirectory() as folder:
        data = ImageData(teacher, domain.data, ConditionSet())
        for name in variants:
            recipe = VARIANTS[name](Recipe.load(domain.recipe)).override("train", steps=2 * rounds + 2)
            student = binarized_copy(teacher)
            if recipe.distill.predict != "teacher":
                student.prediction = recipe.distill.predict
            binarize(student.unet, recipe, teacher.schedule.timesteps)
            trainers[name] = Trainer(teacher, student, recipe, data, Path(folder), 0)
        for round_ in range(rounds + 1):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                trainer._one_step(lambda trainer=trainer: trainer.batches.targets(trainer.step))
                if round_:  # the first round allocates
                    times[name].append(time.perf_counter() - started)
    return {name: median(found) for name, found in times.items()}


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """True if no other process works at ``path``."""
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def train(domain: Domain, chosen: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    chosen.work.mkdir(parents=True, exist_ok=True)
    ratios = json.loads((chosen.work / "ratios.json").read_text()) if chosen.equal == "time" else {}
    for seed in chosen.seeds:
        for name in chosen.variants:
            steps = round(chosen.steps / ratios.get(name, 1.0))
            out = chosen.work / f"{slug(name, seed)}.bidm"
            with claimed(out) as free:
                if free and not out.exists():
                    train_one(domain, name, seed, steps, out)


def train_one(domain: Domain, name: str, seed: int, steps: int, out: Path) -> None:
    """One student, from where it was stopped; its numbers beside it as JSON."""
    teacher = bidm_cli.load_checkpoint(domain.checkpoint)
    recipe = VARIANTS[name](Recipe.load(domain.recipe)).override("train", steps=steps)
    run_dir = out.with_suffix(".run")
    result = bidm_cli.compress(
        teacher,
        recipe,
        out,
        data=domain.data,
        seed=seed,
        run_dir=run_dir,
        resume=(run_dir / "checkpoint.pt").exists(),
    )
    assert result.trajectory is not None
    numbers = {"variant": name, "seed": seed, "steps": steps, "trajectory_error": result.trajectory["mean"]}
    with write_atomically(out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(numbers))
    print(f"{name}, seed {seed}: {steps} steps, {result.seconds:.0f} s, {numbers}", flush=True)


def score(domain: Domain, chosen: argparse.Namespace) -> None:
    """Score what is trained, with this sampler; what has a score keeps it."""
    steps = chosen.sampler_steps or domain.steps
    usual = (chosen.sampler, steps) == ("ddim", domain.steps)
    drawn_by = "" if usual else f", {chosen.sampler} {steps}"
    judge = Judge(domain, chosen.n, chosen.work, chosen.sampler, steps)
    rows = {"original": judge.original_row()}
    print(f"original: {rows['original']}", flush=True)
    for path in sorted(chosen.work.glob("*.bidm")):
        about, scores = path.with_suffix(".json"), path.with_suffix(f".{chosen.sampler}{steps}.json")
        if not about.exists():
            continue
        if not scores.exists():
            numbers = json.loads(about.read_text()) | judge.score(path)
            numbers["variant"] += drawn_by
            with write_atomically(scores) as temporary:
                temporary.write_text(json.dumps(numbers))
        numbers = json.loads(scores.read_text())
        rows[f"{numbers['variant']}, {numbers['steps']} steps, seed {numbers['seed']}"] = numbers
        print(f"{path.stem}: {numbers}", flush=True)
    if chosen.record:
        record(RESULTS / "ablation.jsonl", rows, domain=chosen.domain, n=chosen.n)


def main() -> None:
    """Parse the command line and do one of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=["ratios", "train", "score"])
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "main", "further"], default=["main"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1600, help="of the base recipe")
    parser.add_argument("--equal", choices=["time", "steps"], default="time")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sampler", default="ddim", help="of the students' samples")
    parser.add_argument("--sampler-steps", type=int, help="of the students' samples; default: the domain's")
    parser.add_argument("-n", type=int, default=2048, help="samples of a score")
    parser.add_argument("--record", action="store_true", help="append the scores to ablation.jsonl")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    groups = {"main": list(MAIN), "further": list(FURTHER)}
    chosen.variants = [name for one in chosen.variants for name in groups.get(one, [one])]
    domain = DOMAINS[chosen.domain]
    if chosen.action != "ratios":
        (train if chosen.action == "train" else score)(domain, chosen)
        return
    seconds = step_seconds(domain, ["w1a1", *(n for n in chosen.variants if n != "w1a1")], chosen.rounds)
    ratios = {name: value / seconds["w1a1"] for name, value in seconds.items()}
    chosen.work.mkdir(parents=True, exist_ok=True)
    known = chosen.work / "ratios.json"
    ratios = (json.loads(known.read_text()) if known.exists() else {}) | ratios
    known.write_text(json.dumps(ratios, indent=1))
    for name, value in seconds.items():
        print(f"{name}: {value:.3f} s, {ratios[name]:.2f}x")


if __name__ == "__main__":
    main()
