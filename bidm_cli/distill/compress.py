"""Compression: binarize a checkpoint's network, distil it against the original, pack it into one file.

compress(load_checkpoint("model.ckpt"), Recipe.load("w1a1"), out="model.bidm", data="images/")
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from bidm_cli.binary.surgery import LayerPlan, binarize
from bidm_cli.checkpoints.evidence import caveats_json
from bidm_cli.data.condition_files import ConditionSource
from bidm_cli.data.summary import DataSummary
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.data import draw_synthetic, open_data, synthetic_plan, training_conditions
from bidm_cli.distill.decoder_error import decoder_error
from bidm_cli.distill.fingerprint import check_same_data, check_same_run
from bidm_cli.distill.runs import RECIPE, choose_run_dir, removed_if_refused, write_recipe, write_result
from bidm_cli.distill.trainer import LogRow, Trainer, binarized_copy
from bidm_cli.distill.training_data import DataOptions, TrainingData
from bidm_cli.distill.trajectory import TRAJECTORY_POINTS, trajectory_error, trajectory_images
from bidm_cli.errors import BidmError
from bidm_cli.keywords import with_keywords
from bidm_cli.packed.format.container import is_packed, write_packed
from bidm_cli.packed.format.first_stage import StageForm
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.parallel.processes import Processes, device_of, joined
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.options import check_sampler
from bidm_cli.version import __version__


@dataclass(frozen=True)
class CompressOptions(DataOptions):
    """Settings of one run besides its recipe and its data (:class:`DataOptions`).

    Attributes:
        steps, batch_size, lr, amp, accumulate, checkpoint_activations: override the recipe's ``train``;
            ``lr`` keeps lr_binary's proportion.
        seed: decides every random choice; the same seed gives the same bytes (CPU, same threads).
        run_dir: see :mod:`bidm_cli.distill.runs`. resume: continue the run there.
        trajectory_points: steps of the teacher's path along which the trajectory error is measured at the
            end; 0 leaves it out.
    """

    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    amp: str | None = None
    accumulate: int | None = None
    checkpoint_activations: bool | None = None
    device: str | torch.device = "cpu"
    seed: int = 0
    run_dir: str | Path | None = None
    resume: bool = False
    trajectory_points: int = TRAJECTORY_POINTS

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with these options in place of its own; BidmError for a value out of range."""
        train = recipe.train
        lr_binary = self.lr * train.lr_binary / train.lr if self.lr and train.lr else None
        names = ("steps", "batch_size", "lr", "amp", "accumulate", "checkpoint_activations")
        own = {name: getattr(self, name) for name in names}
        return recipe.override("train", lr_binary=lr_binary, **own)


@dataclass(frozen=True)
class PlannedRun:
    """A compression that is about to train, as ``reporter.begin`` of :func:`compress` gets it.

    Attributes:
        model: the original. recipe: as it will really run, with the options applied.
        data: one line on the training data.
    """

    model: DiffusionModel
    recipe: Recipe
    layers: list[LayerPlan]
    data: str
    out: Path
    folder: Path
    options: CompressOptions


@dataclass(frozen=True)
class CompressResult:
    """Packed file, run folder, rule and spec per layer, trajectory error and log of :func:`compress`.

    ``trajectory`` is None where it was not asked for, ``first_stage`` where there is none: its form ("keep",
    "weights", "errors" per quantized weight) and the error of its pictures
    (:func:`bidm_cli.distill.decoder_error.decoder_error`).
    """

    path: Path
    run_dir: Path
    layers: list[LayerPlan]
    trajectory: dict[str, Any] | None
    rows: list[LogRow]
    seconds: float
    first_stage: dict[str, Any] | None = None


def compress(
    model: DiffusionModel,
    recipe: Recipe,
    out: str | Path,
    *,
    options: CompressOptions = CompressOptions(),
    conditions: ConditionSource = ConditionSource(),
    reporter: Reporter | None = None,
    **keywords: Any,
) -> CompressResult:
    """Compress ``model`` as ``recipe`` says and write the packed file ``out``.

    Args:
        options, conditions: records whose fields may also be given as keywords: ``data``, ``steps``,
            ``data_labels``, ``data_range``, ``bad_images``, ``latents_cache``, ``batch_size``, ``lr``,
            ``amp``, ``accumulate``, ``checkpoint_activations``, ``device``, ``seed``, ``run_dir``,
            ``resume``, ``trajectory_points``; ``context``, ... .
            Training draws from the conditions; a ``context`` in the .npz of ``data`` goes with its samples.
            The unconditional context is packed.

    Under torchrun each process trains on its share of every batch; all return when the file is there.

    Raises:
        BidmError: anything in recipe, data, output or run folder that cannot work; nothing is half-written.
    """
    options, conditions = with_keywords(keywords, options, conditions)
    out = Path(out)
    check_output(out)
    recipe = options.applied_to(recipe)
    try:
        check_sampler(recipe.sampler.name, recipe.sampler.eta)
    except BidmError as error:
        raise BidmError(f"{recipe.where('sampler.eta')}: {error}") from error
    with joined(options.device) as processes:
        options = replace(options, device=device_of(options.device))
        return _compress(model, recipe, out, options, conditions, reporter or Reporter(), processes)


def _compress(
    model: DiffusionModel,
    recipe: Recipe,
    out: Path,
    options: CompressOptions,
    conditions: ConditionSource,
    reporter: Reporter,
    processes: Processes,
) -> CompressResult:
    """:func:`compress` with all settled."""
    source = getattr(model, "source", None)
    stem = Path(source).stem if source else "model"
    run_dir = Path(options.run_dir) if options.run_dir else None
    if processes.is_first:
        run_dir = choose_run_dir(stem, recipe.name, run_dir, options.resume)
    folder = Path(processes.from_first(str(run_dir)))
    model, gathered = training_conditions(model.to(options.device), conditions, options.data)
    student = binarized_copy(model)
    if recipe.distill.predict != "teacher":
        student.prediction = recipe.distill.predict
    layers = binarize(student.unet, recipe, model.schedule.timesteps)

    started = time.monotonic()
    reporter = reporter if processes.is_first else Reporter(say=processes.notes.append)
    run = _Run(model, student, recipe, gathered, folder, options, reporter, processes)
    with removed_if_refused(folder) if processes.is_first else contextlib.nullcontext():
        data, summary = run.open_data()
        if processes.is_first:
            reporter.begin(PlannedRun(model, recipe, layers, summary.line(), out, folder, options))
        data = run.draw() if data is None else data
        rows = run.train(data)
    trajectory, stage = run.pack(rows, out, data) if processes.is_first else (None, None)
    processes.wait()
    trajectory, stage = processes.from_first([trajectory, stage])
    result = CompressResult(out, folder, layers, trajectory, rows, time.monotonic() - started, stage)
    if processes.is_first:
        write_result(folder, _result_json(result, source))
    return result


def check_output(out: Path) -> None:
    """Raise BidmError if ``out`` is a folder, or a file that bidm did not write."""
    if out.is_dir():
        raise BidmError(f"{out} is a folder; name the packed file to write, such as {out / 'model.bidm'}")
    if out.exists() and not is_packed(out):
        raise BidmError(f"{out} exists and is not a packed file; choose another name with -o")


@dataclass(frozen=True)
class _Run:
    """One compression under way: everything that training and packing share."""

    teacher: DiffusionModel
    student: DiffusionModel
    recipe: Recipe
    conditions: ConditionSet
    folder: Path
    options: CompressOptions
    reporter: Reporter
    processes: Processes

    def open_data(self) -> tuple[TrainingData | None, DataSummary]:
        """The user's training data, None if they are to be drawn, and what they are.

        The run's records are written once the data are known to be good.
        """
        recipe, folder, options, reporter = self.recipe, self.folder, self.options, self.reporter
        for line in self.conditions.notes:
            reporter.say(line)
        data = open_data(self.teacher, options, self.conditions, reporter)
        summary = synthetic_plan(self.teacher, recipe.train) if data is None else data.summary
        if self.processes.is_first:
            check_same_run(folder, self.teacher, self.conditions, options.resume)
            check_same_data(folder, summary, options.resume)
            write_recipe(folder, recipe, replace=not options.resume)
        self.processes.check_shared(folder / RECIPE)
        self.processes.check_same(_settings_in_short(recipe, summary, options.seed))
        self.processes.notes.clear()  # the first has said the same
        return data, summary

    def draw(self) -> TrainingData:
        """Samples of the original as training data."""
        train, seed = self.recipe.train, self.options.seed
        return draw_synthetic(
            self.teacher, train, self.conditions, self.folder, seed, self.reporter, self.processes
        )

    def train(self, data: TrainingData) -> list[LogRow]:
        """Distil the student to the last step and give it the averaged weights; rows of the log."""
        recipe, folder, options, reporter = self.recipe, self.folder, self.options, self.reporter
        reporter.stage("distil", recipe.train.steps)
        trainer = Trainer(
            self.teacher, self.student, recipe, data, folder, options.seed, reporter, self.processes
        )
        if options.resume and trainer.resume():
            for _ in range(trainer.step):
                reporter.advance(None)
        self.processes.check_same({"state": trainer.step})
        if self.processes.is_first:
            write_recipe(folder, recipe)
        trainer.train()
        self.student.unet = trainer.ema.module
        return trainer.rows

    def pack(
        self, rows: list[LogRow], out: Path, data: TrainingData
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Pack, measure, and write the packed file with these measurements inside.

        Returns (trajectory error, form and error of the first stage).
        """
        training: dict[str, Any] = {"rows": [vars(row) for row in rows[:: max(1, len(rows) // 50)]]}
        training["final"] = vars(rows[-1]) if rows else None
        provenance = _provenance(self.teacher, self.recipe, self.options.seed, data.summary)
        caveats = caveats_json(self.teacher)
        metadata, tensors = pack_model(self.student, self.recipe.to_json(), provenance, training, caveats)
        stage = decoder_error(self.teacher, metadata, tensors, data)
        if stage is not None:
            training["first_stage"] = stage
            form = StageForm.of(self.student, self.recipe.to_json())
            stage = {"keep": form.keep, "weights": form.weights, **metadata.get("first_stage", {}), **stage}
        if not self.options.trajectory_points:
            write_packed(out, metadata, tensors)
            return None, stage
        trial = self.folder / "packed.bidm"
        write_packed(trial, metadata, tensors)
        trajectory = self._trajectory(trial)
        metadata = {**metadata, "training": {**training, "trajectory_error": trajectory}}
        write_packed(out, metadata, tensors)
        trial.unlink()
        return trajectory, stage

    def _trajectory(self, path: Path) -> dict[str, Any]:
        """Trajectory error of the packed file at ``path``."""
        packed = load_packed(path, device=str(self.teacher.device))
        packed.warm_up(self.reporter.compiling)
        points, images = self.options.trajectory_points, trajectory_images(self.teacher)
        points = min(points, self.teacher.schedule.timesteps)
        self.reporter.say(
            f"trajectory error: the original and the packed network are run on {images} images at {points} "
            "points of the schedule (`trajectory_points`)"
        )
        self.reporter.stage("measure the trajectory error", points)
        return trajectory_error(
            self.teacher, packed, images, points, self.options.seed, self.conditions, self.reporter
        )


def _settings_in_short(recipe: Recipe, summary: DataSummary, seed: int) -> dict[str, Any]:
    """All that the processes of a run must have in common, by what it is."""
    return {
        "recipe": hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:12],
        "seed": seed,
        "number of samples": summary.count,
        "content of the data": summary.digest[:12],
        "labels of the data": summary.labels_digest[:12],
    }


def _provenance(teacher: DiffusionModel, recipe: Recipe, seed: int, data: DataSummary) -> dict[str, Any]:
    source = getattr(teacher, "source", None)
    return {
        "source": Path(source).name if source else None,
        "sha256": getattr(teacher, "sha256", None),
        "steps": recipe.train.steps,
        "seed": seed,
        "data": data.to_json(),
        "versions": {
            "bidm": __version__,
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
        "first_stage": result.first_stage,
        "losses": vars(result.rows[-1]) if result.rows else None,
        "steps": result.rows[-1].step if result.rows else 0,
        "seconds": result.seconds,
    }
