"""Open questions of training, tried outside the product: what is learned is in the float simulation alone.

    python benchmarks/open_questions.py digits --work runs/questions --steps 800 --seeds 0 1
    python benchmarks/open_questions.py faces --work runs/questions --steps 600 --variants rprelu w1a1

Each student is trained from the domain's base recipe (ablation_domains.py) with one change, for the same
number of base steps, and sampled with DPM-Solver++(2M) in 20 steps. Several of it may run at once; what is
trained is left alone. Rows go to benchmarks/results/open_questions.jsonl with ``--record``.

rprelu: after each binary convolution y the learnable shifts and slope of ReActNet (arXiv 2003.03488),
    z + b for z = y - a > 0, else r z + b, one a, b, r per channel, which start at 0, 0, 1.
adapted: the network is first trained in floats to predict v (``ADAPTATION`` steps of the base's loss at a
    twentieth of its rate), and then made binary; three float steps count as two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from ablation import claimed, slug
from ablation_domains import DOMAINS, Domain
from ablation_recipes import FULL_RESOLUTION, Change, planes, train
from ablation_score import Judge
from record import RESULTS, record
from torch import Tensor, nn

import bidm_cli
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.surgery import binarize
from bidm_cli.cli.threads import use_threads
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.distill.trajectory import trajectory_error
from bidm_cli.files import write_atomically
from bidm_cli.recipe import Recipe
from bidm_cli.report.metrics.compare import compare

ADAPTATION = 150
SAMPLER, SAMPLER_STEPS = "dpm++", 20


@dataclass(frozen=True)
class Question:
    """One change: of the recipe, of the binary network, and float steps before it is made."""

    recipe: Change = lambda recipe: recipe
    network: Callable[[nn.Module], None] = lambda network: None
    float_steps: int = 0


class RPReLU(nn.Module):
    """ReActNet's activation of y [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor) -> Tensor:
        before, after = (shift[:, None, None] for shift in (self.before, self.after))
        return nn.functional.prelu(y - before, self.slope) + after


def with_rprelu(network: nn.Module) -> None:
    """Put an RPReLU behind every binary convolution."""
    for layer in list(network.modules()):
        if isinstance(layer, BinaryLayer) and layer.geometry.kind == "conv2d":
            layer.add_module("rprelu", RPReLU(layer.geometry.out_channels))
            layer.register_forward_hook(lambda module, inputs, y: module.rprelu(y))


def rate(factor: float) -> Change:
    """The base's rates times ``factor``."""
    return lambda recipe: train(lr=factor * recipe.train.lr, lr_binary=factor * recipe.train.lr_binary)(
        recipe
    )


QUESTIONS = {
    "w1a1": Question(),
    "rprelu": Question(network=with_rprelu),
    "adapted": Question(float_steps=ADAPTATION),
    "progressive 0.5": Question(recipe=train(progressive=0.5)),
    "progressive 0.6": Question(recipe=train(progressive=0.6)),
    "half the rate": Question(recipe=rate(0.5)),
    "twice the rate": Question(recipe=rate(2)),
    "two planes at full resolution": Question(recipe=planes(2, FULL_RESOLUTION)),
    "w1a2": Question(recipe=planes(2)),
}


def trained(domain: Domain, question: Question, steps: int, seed: int, folder: Path) -> DiffusionModel:
    """The student with its averaged weights, from where it was stopped."""
    teacher = bidm_cli.load_checkpoint(domain.checkpoint)
    data = ImageData(teacher, domain.data, ConditionSet())
    recipe = question.recipe(Recipe.load(domain.recipe)).override(
        "train", steps=steps - question.float_steps * 2 // 3
    )
    student = binarized_copy(teacher)
    student.prediction = "v"
    if question.float_steps:
        low = 0.05 * recipe.train.lr
        floats = recipe.override("train", steps=question.float_steps, lr=low, lr_binary=low, progressive=0.0)
        student.unet = _run(Trainer(teacher, student, floats, data, _made(folder / "float"), seed))
    torch.manual_seed(seed)
    binarize(student.unet, recipe, teacher.schedule.timesteps)
    question.network(student.unet)
    student.unet = _run(Trainer(teacher, student, recipe, data, _made(folder), seed))
    return student


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(trainer: Trainer) -> nn.Module:
    trainer.resume()
    trainer.train()
    return trainer.ema.module


def answer(domain: Domain, name: str, seed: int, chosen: argparse.Namespace) -> dict[str, object]:
    """Numbers of one student."""
    work = chosen.work / chosen.domain
    student = trained(domain, QUESTIONS[name], chosen.steps, seed, work / f"{slug(name, seed)}.run")
    teacher = bidm_cli.load_checkpoint(domain.checkpoint)
    judge = Judge(domain, chosen.n, work, SAMPLER, SAMPLER_STEPS)
    drawn = judge.drawn(student, slug(name, seed), SAMPLER, SAMPLER_STEPS)
    data = compare(drawn.statistics, judge.reference, judge.network).values
    original = compare(drawn.statistics, judge.original.statistics, judge.network).values
    return {
        "variant": name,
        "seed": seed,
        "steps": chosen.steps,
        "trajectory_error": trajectory_error(teacher, student)["mean"],
        "free_error": float((drawn.latents - judge.original.latents).square().mean()),
        "fd_data": data["value"],
        "fd_teacher": original["value"],
    }


def main() -> None:
    """Train and score what is not there yet; print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--work", type=Path, default=Path("runs/questions"))
    parser.add_argument("--variants", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-n", type=int, default=1024, help="samples of a score")
    parser.add_argument("--record", action="store_true", help="append the rows to open_questions.jsonl")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    folder = _made(chosen.work / chosen.domain)
    for seed in chosen.seeds:
        for name in chosen.variants:
            out = folder / f"{slug(name, seed)}.json"
            with claimed(out) as free:
                if free and not out.exists():
                    numbers = answer(DOMAINS[chosen.domain], name, seed, chosen)
                    with write_atomically(out) as temporary:
                        temporary.write_text(json.dumps(numbers))
    paths = [folder / f"{slug(name, seed)}.json" for seed in chosen.seeds for name in chosen.variants]
    rows = [json.loads(path.read_text()) for path in paths if path.exists()]
    for row in rows:
        print(row, flush=True)
    if chosen.record:
        named = {f"{row['variant']}, {row['steps']} steps, seed {row['seed']}": row for row in rows}
        record(RESULTS / "open_questions.jsonl", named, domain=chosen.domain, n=chosen.n)


if __name__ == "__main__":
    main()
