"""The main job: binarize a checkpoint's network, distil it against the original, pack it into one file.

compress(load_checkpoint("model.ckpt"), Recipe.load("w1a1"), out="model.bidm", data="images/")
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

import bidm_cli
from bidm_cli.binary.surgery import LayerPlan, binarize
from bidm_cli.data.condition_files import Source, gather
from bidm_cli.diffusion.condition import ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.data import ImageData, SyntheticData, TrainingData
from bidm_cli.distill.fingerprint import keep_conditions, keep_model
from bidm_cli.distill.latents import LatentData, holds_latents, paired_context
from bidm_cli.distill.runs import choose_run_dir, write_recipe, write_result
from bidm_cli.distill.trainer import LogRow, Trainer, binarized_copy
from bidm_cli.distill.trajectory import trajectory_error
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import is_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe


@dataclass(frozen=True)
class Reporter:
    """Where progress goes; the command line draws bars with it.

    Attributes:
        stage: called with a name and the number of steps in it, before it begins.
        advance: called after each step, with a log row now and then.
        say: called with a line on how data or conditions were taken.
        compiling: called with pieces of a line, while kernels are compiled.
    """

    stage: Callable[[str, int], None] = lambda name, total: None
    advance: Callable[[LogRow | None], None] = lambda row: None
    say: Callable[[str], None] = lambda line: None
    compiling: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class CompressResult:
    """What came of it: the packed file, the run's folder, each layer's fate, the trajectory error."""

    path: Path
    run_dir: Path
    layers: list[LayerPlan]
    trajectory: dict[str, Any]
    rows: list[LogRow]
    seconds: float


def compress(
    model: DiffusionModel,
    recipe: Recipe,
    out: str | Path,
    *,
    data: str | Path | None = None,
    context: Source | None = None,
    unconditional_context: Source | None = None,
    condition: Source | None = None,
    mask: Source | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    device: str | torch.device = "cpu",
    amp: str | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> CompressResult:
    """Compress ``model`` as ``recipe`` says and write the packed file ``out``.

    Args:
        data: images to distil on: a folder, a zip or an .npz, or latents, an .npz or .npy of floats
            [M, C, H, W]. None: data-free, x0 is sampled from the model.
        context, unconditional_context, condition, mask: for models conditioned on other than classes, as
            :func:`bidm_cli.data.condition_files.gather` takes them. Training draws from them; a
            ``context`` in the .npz of ``data`` goes with its samples. The unconditional context is packed.
        steps, batch_size, lr, amp: override the recipe's ``train``; ``lr`` keeps lr_binary's proportion.
        seed: decides every random choice; the same seed gives the same bytes (CPU, same threads).
        run_dir: see :mod:`bidm_cli.distill.runs`. resume: continue the run that lies there.

    Raises:
        BidmError: anything in recipe, data, output or run folder that cannot work; nothing is half-written.
    """
    out, reporter = Path(out), reporter or Reporter()
    check_output(out)
    recipe = with_overrides(recipe, steps, batch_size, lr, amp)
    source = getattr(model, "source", None)
    folder = choose_run_dir(_stem(source), recipe.name, Path(run_dir) if run_dir else None, resume)
    model.to(device)
    model, rows = gather(model, context, unconditional_context, condition, mask)
    rows, paired = _with_paired_contexts(model, data, rows)
    _check_rows(model, data, rows)
    student = binarized_copy(model)
    layers = binarize(student.unet, recipe, model.schedule.timesteps)
    started = time.monotonic()

    keep_model(folder, model, resume)
    keep_conditions(folder, model, rows, resume)
    write_recipe(folder, recipe, replace=not resume)
    for line in rows.notes:
        reporter.say(line)
    samples = open_data(model, recipe, data, folder, seed, reporter, rows, paired)
    reporter.stage("distil", recipe.train.steps)
    trainer = Trainer(
        model, student, recipe, samples, folder, seed, on_step=lambda step, row: reporter.advance(row)
    )
    if resume and trainer.resume():
        for _ in range(trainer.step):
            reporter.advance(None)
    write_recipe(folder, recipe)
    trainer.train()

    student.unet = trainer.ema.module
    trajectory, path = _pack(model, student, recipe, trainer.rows, seed, out, folder, reporter, rows)
    result = CompressResult(path, folder, layers, trajectory, trainer.rows, time.monotonic() - started)
    write_result(folder, _result_json(result, source))
    return result


def check_output(out: Path) -> None:
    """Refuse to overwrite anything but a packed file.

    Raises:
        BidmError: ``out`` is a folder, or a file that bidm did not write.
    """
    if out.is_dir():
        raise BidmError(f"{out} is a folder; name the packed file to write, such as {out / 'model.bidm'}")
    if out.exists() and not is_packed(out):
        raise BidmError(f"{out} exists and is not a packed file; choose another name with -o")


def with_overrides(
    recipe: Recipe, steps: int | None, batch_size: int | None, lr: float | None, amp: str | None
) -> Recipe:
    """The recipe with command-line values in place of its own."""
    lr_binary = lr * recipe.train.lr_binary / recipe.train.lr if lr and recipe.train.lr else None
    return recipe.override("train", steps=steps, batch_size=batch_size, lr=lr, lr_binary=lr_binary, amp=amp)


def open_data(
    model: DiffusionModel,
    recipe: Recipe,
    data: str | Path | None,
    folder: Path,
    seed: int,
    reporter: Reporter,
    rows: ConditionSet | None = None,
    paired: bool = False,
) -> TrainingData:
    """Images or latents from ``data``, or as many of the model's own samples as the training can use.

    ``rows``: contexts and conditioning channels. ``paired``: context k belongs to sample k of ``data``.
    """
    rows = rows or ConditionSet()
    if data is not None:
        if rows.context is not None:
            how = "each sample has its own" if paired else "drawn independently of the samples"
            reporter.say(f"{len(rows.context)} contexts, {how}")
        if holds_latents(data):
            found = LatentData(model, data, rows, paired)
            reporter.say(f"{data}: taken as {len(found)} latents {shape_text(model.sample_shape)}")
            return found
        return ImageData(model, data, rows, paired)
    wanted = max(1, recipe.train.steps * recipe.train.batch_size)
    count = min(recipe.train.synthetic_images, wanted)
    reporter.stage("draw training samples from the original", count)
    drawn = 0

    def progress(done: int, total: int) -> None:
        nonlocal drawn
        for _ in range(done - drawn):
            reporter.advance(None)
        drawn = done

    steps = min(recipe.train.synthetic_steps, model.schedule.timesteps)
    return SyntheticData(model, folder, count, steps, seed, progress, rows)


def _with_paired_contexts(
    model: DiffusionModel, data: str | Path | None, rows: ConditionSet
) -> tuple[ConditionSet, bool]:
    """(rows with the contexts of the data set itself where no others are given, whether they are its own)."""
    if data is None or rows.context is not None or model.context_width is None:
        return rows, False
    context = paired_context(data)
    if context is None:
        return rows, False
    return ConditionSet(context, rows.concat, rows.notes), True


def _check_rows(model: DiffusionModel, data: str | Path | None, rows: ConditionSet) -> None:
    """What can be said of the conditions before anything is written."""
    if not model.embeds_labels or rows.context is not None:
        model.check(None if model.num_classes is None else torch.zeros(1, dtype=torch.long), rows.whole)
    null = model.null_context
    if rows.context is not None and null is not None and null.shape[1] != rows.context.shape[1]:
        raise BidmError(
            f"the unconditional context has {null.shape[1]} tokens, the contexts {rows.context.shape[1]}; "
            "training needs as many (--unconditional-context)"
        )


def _pack(
    teacher: DiffusionModel,
    student: DiffusionModel,
    recipe: Recipe,
    rows: list[LogRow],
    seed: int,
    out: Path,
    folder: Path,
    reporter: Reporter,
    conditions: ConditionSet,
) -> tuple[dict[str, Any], Path]:
    """Pack, measure what was packed, and write it with that measurement inside."""
    training: dict[str, Any] = {"rows": [vars(row) for row in rows[:: max(1, len(rows) // 50)]]}
    training["final"] = vars(rows[-1]) if rows else None
    provenance = _provenance(teacher, recipe, seed)
    trial = folder / "packed.bidm"
    metadata, tensors = pack_model(student, recipe.to_json(), provenance, training)
    write_packed(trial, metadata, tensors)
    packed = load_packed(trial, device=str(teacher.device))
    packed.warm_up(reporter.compiling)
    steps = min(recipe.sampler.steps, teacher.schedule.timesteps)
    reporter.stage("measure the trajectory error", steps)
    trajectory = trajectory_error(
        teacher,
        packed,
        steps=steps,
        seed=seed,
        on_step=lambda: reporter.advance(None),
        conditions=conditions,
    )
    metadata = {**metadata, "training": {**training, "trajectory_error": trajectory}}
    write_packed(out, metadata, tensors)
    trial.unlink()
    return trajectory, out


def _provenance(teacher: DiffusionModel, recipe: Recipe, seed: int) -> dict[str, Any]:
    source = getattr(teacher, "source", None)
    return {
        "source": Path(source).name if source else None,
        "sha256": getattr(teacher, "sha256", None),
        "steps": recipe.train.steps,
        "seed": seed,
        "versions": {
            "bidm": bidm_cli.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
    }


def _result_json(result: CompressResult, source: Any) -> dict[str, Any]:
    return {
        "packed": str(result.path.resolve()),
        "teacher": str(Path(source).resolve()) if source else None,
        "trajectory_error": result.trajectory,
        "losses": vars(result.rows[-1]) if result.rows else None,
        "steps": result.rows[-1].step if result.rows else 0,
        "seconds": result.seconds,
    }


def _stem(source: Any) -> str:
    return Path(source).stem if source else "model"
