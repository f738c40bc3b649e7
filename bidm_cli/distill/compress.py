"""Compression: binarize a checkpoint's network, distil it against the original, pack it into one file.

compress(load_checkpoint("model.ckpt"), Recipe.load("w1a1"), out="model.bidm", data="images/")
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from bidm_cli.binary.first_stage import BinaryDecoder, binary_decoder
from bidm_cli.binary.surgery import LayerPlan, binarize
from bidm_cli.checkpoints.evidence import caveats_json
from bidm_cli.data.condition_files import ConditionSource
from bidm_cli.data.summary import DataSummary
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.data import draw_synthetic, open_data, synthetic_plan, training_conditions
from bidm_cli.distill.fingerprint import check_same_data, check_same_run
from bidm_cli.distill.first_stage.decoder_error import decoder_error
from bidm_cli.distill.first_stage.trainer import DecoderRow, check_optimizer, distil_decoder
from bidm_cli.distill.runs import RECIPE, locked_run_dir, removed_if_refused, write_recipe, write_result
from bidm_cli.distill.trainer import LogRow, Trainer, binarized_copy
from bidm_cli.distill.training_data import DataOptions, TrainingData
from bidm_cli.distill.trajectory import TRAJECTORY_POINTS, trajectory_error, trajectory_images
from bidm_cli.errors import BidmError
from bidm_cli.files import check_writable
from bidm_cli.interrupts import explained
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
            ``lr`` keeps lr_binary's proportion; the last three are those of ``first_stage.train``, too.
        decoder_steps: overrides steps of the latter.
        seed: decides every random choice; the same seed gives the same bytes (CPU, same threads).
        run_dir: see :mod:`bidm_cli.distill.runs`. resume: continue the run there.
        skip_nan: steps in a row that may be left out because their loss or gradient is not finite; 0 stops
            at the first.
        trajectory_points: steps of the teacher's path along which the trajectory error is measured at the
            end; 0 leaves it out.
    """

    steps: int | None = None
    decoder_steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    amp: str | None = None
    accumulate: int | None = None
    checkpoint_activations: bool | None = None
    device: str | torch.device = "cpu"
    seed: int = 0
    run_dir: str | Path | None = None
    resume: bool = False
    skip_nan: int = 0
    trajectory_points: int = TRAJECTORY_POINTS

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with these options in place of its own; BidmError for a value out of range."""
        train = recipe.train
        lr_binary = self.lr * train.lr_binary / train.lr if self.lr and train.lr else None
        names = ("steps", "batch_size", "lr", "amp", "accumulate", "checkpoint_activations")
        own = {name: getattr(self, name) for name in names}
        recipe = recipe.override("train", lr_binary=lr_binary, **own)
        if not recipe.first_stage.is_binary:
            if self.decoder_steps is not None:
                raise BidmError(
                    "`decoder_steps` is for a binary first stage; give a recipe with layers under "
                    "first_stage, such as w1a2-decoder"
                )
            return recipe
        decoder = {name: own[name] for name in names[3:]} | {"steps": self.decoder_steps}
        changes: dict[str, Any] = {name: value for name, value in decoder.items() if value is not None}
        return recipe.override("first_stage", train=dataclasses.replace(recipe.first_stage.train, **changes))


@dataclass(frozen=True)
class PlannedRun:
    """A compression that is about to train, as ``reporter.begin`` of :func:`compress` gets it.

    Attributes:
        model: the original. recipe: as it will really run, with the options applied.
        layers, decoder: decision on each layer of the network, and of a decoder that is to be binary.
        data: one line on the training data.
    """

    model: DiffusionModel
    recipe: Recipe
    layers: list[LayerPlan]
    decoder: list[LayerPlan]
    data: str
    out: Path
    folder: Path
    options: CompressOptions


@dataclass(frozen=True)
class CompressResult:
    """Packed file, run folder, rule and spec per layer, trajectory error and log of :func:`compress`.

    ``skipped`` is the number of steps that were left out (``skip_nan``).

    ``trajectory`` is None where it was not asked for, ``first_stage`` where there is none: its form ("keep",
    "weights", "errors" per quantized weight, "layers" of a binary decoder) and the error of its pictures
    (:func:`bidm_cli.distill.first_stage.decoder_error.decoder_error`).
    """

    path: Path
    run_dir: Path
    layers: list[LayerPlan]
    trajectory: dict[str, Any] | None
    rows: list[LogRow]
    seconds: float
    first_stage: dict[str, Any] | None = None
    skipped: int = 0


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
            ``resume``, ``skip_nan``, ``decoder_steps``, ``trajectory_points``; ``context``, ... .
            Training draws from the conditions; a ``context`` in the .npz of ``data`` goes with its samples.
            The unconditional context is packed.

    Under torchrun each process trains on its share of every batch; all return when the file is there.

    Raises:
        BidmError: anything in recipe, data, output or run folder that cannot work; nothing is half-written.
        Interrupted: a signal came; the run is continued with ``resume``.
    """
    options, conditions = with_keywords(keywords, options, conditions)
    out = Path(out)
    check_output(out)
    recipe = options.applied_to(recipe)
    try:
        check_sampler(recipe.sampler.name, recipe.sampler.eta)
    except BidmError as error:
        raise BidmError(f"{recipe.where('sampler.eta')}: {error}") from error
    reporter = reporter or Reporter()
    with joined(options.device) as processes:
        options = replace(options, device=device_of(options.device))
        with (
            _folder_of(model, recipe, options, reporter, processes) as folder,
            explained(lambda: _how_to_go_on(folder)),
        ):
            return _compress(model, recipe, out, folder, options, conditions, reporter, processes)


@contextlib.contextmanager
def _folder_of(
    model: DiffusionModel,
    recipe: Recipe,
    options: CompressOptions,
    reporter: Reporter,
    processes: Processes,
) -> Iterator[Path]:
    """The run's folder, which the first process chooses and locks."""
    if not processes.is_first:
        yield Path(processes.from_first(None))
        return
    source = getattr(model, "source", None)
    stem = Path(source).stem if source else "model"
    run_dir = Path(options.run_dir) if options.run_dir else None
    with locked_run_dir(stem, recipe.name, run_dir, options.resume, reporter.say) as folder:
        processes.from_first(str(folder))
        yield folder


def _compress(
    model: DiffusionModel,
    recipe: Recipe,
    out: Path,
    folder: Path,
    options: CompressOptions,
    conditions: ConditionSource,
    reporter: Reporter,
    processes: Processes,
) -> CompressResult:
    """:func:`compress` with all settled."""
    source = getattr(model, "source", None)
    model, gathered = training_conditions(model.to(options.device), conditions, options.data)
    student = binarized_copy(model)
    if recipe.distill.predict != "teacher":
        student.prediction = recipe.distill.predict
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        # New layers (`refine`) are initialized from the global generator.
        torch.manual_seed(options.seed)
        layers = binarize(student.unet, recipe, model.schedule.timesteps)
    decoder = binary_decoder(model.first_stage, recipe)
    planned = [] if decoder is None else decoder.layers
    if decoder is not None:
        check_optimizer(decoder, recipe)

    started = time.monotonic()
    reporter = reporter if processes.is_first else Reporter(say=processes.notes.append)
    run = _Run(model, student, decoder, recipe, gathered, folder, options, reporter, processes)
    with removed_if_refused(folder) if processes.is_first else contextlib.nullcontext():
        data, summary = run.open_data()
        if processes.is_first:
            reporter.begin(PlannedRun(model, recipe, layers, planned, summary.line(), out, folder, options))
        data = run.draw() if data is None else data
        rows, skipped = run.train(data)
        decoder_rows = run.train_decoder(data)
    packed = run.pack(rows, decoder_rows, skipped, out, data) if processes.is_first else (None, None)
    processes.wait()
    trajectory, stage = processes.from_first(list(packed))
    seconds = time.monotonic() - started
    result = CompressResult(out, folder, layers, trajectory, rows, seconds, stage, skipped)
    if processes.is_first:
        write_result(folder, _result_json(result, source))
    return result


def _how_to_go_on(folder: Path) -> str:
    """Message of an interrupted run, empty before anything was written that could be continued."""
    if not (folder / "recipe.yaml").is_file():
        return ""
    return f"stopped; what is done is in {folder}; continue with `resume`"


def check_output(out: Path) -> None:
    """Raise BidmError if ``out`` is a folder, a file that bidm did not write, or in a read-only folder."""
    if out.is_dir():
        raise BidmError(f"{out} is a folder; name the packed file to write, such as {out / 'model.bidm'}")
    if out.exists() and not is_packed(out):
        raise BidmError(f"{out} exists and is not a packed file; choose another name with -o")
    check_writable(out)


@dataclass(frozen=True)
class _Run:
    """One compression under way: everything that training and packing share."""

    teacher: DiffusionModel
    student: DiffusionModel
    decoder: BinaryDecoder | None
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
        if self.decoder is None and recipe.first_stage.is_binary:
            reporter.say("first_stage.layers of the recipe are of no use: this model has no decoder at hand")
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

    def train(self, data: TrainingData) -> tuple[list[LogRow], int]:
        """Distil the student to the last step and give it the averaged weights.

        Returns (rows of the log, number of steps that were left out).
        """
        recipe, folder, options, reporter = self.recipe, self.folder, self.options, self.reporter
        reporter.stage("distil", recipe.train.steps)
        teacher, student, skip_nan = self.teacher, self.student, options.skip_nan
        trainer = Trainer(
            teacher, student, recipe, data, folder, options.seed, reporter, skip_nan, self.processes
        )
        if options.resume and trainer.resume():
            for _ in range(trainer.step):
                reporter.advance(None)
        self.processes.check_same({"state": trainer.step})
        if self.processes.is_first:
            write_recipe(folder, recipe)
        trainer.train()
        self.student.unet = trainer.ema.module
        return trainer.rows, len(trainer.watch.skipped)

    def train_decoder(self, data: TrainingData) -> list[DecoderRow]:
        """Distil the first stage's decoder, if it is to be binary, for the student; rows of its log."""
        if self.decoder is None:
            return []
        options = self.options
        self.student.first_stage, rows = distil_decoder(
            self.teacher, self.decoder, self.recipe, data, self.folder, options.seed, options.resume,
            self.reporter, options.skip_nan, self.processes,
        )  # fmt: skip
        return rows

    def pack(
        self, rows: list[LogRow], decoder_rows: list[DecoderRow], skipped: int, out: Path, data: TrainingData
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Pack, measure, and write the packed file with these measurements inside.

        Returns (trajectory error, form and error of the first stage).
        """
        training: dict[str, Any] = {"rows": [vars(row) for row in rows[:: max(1, len(rows) // 50)]]}
        training["final"] = vars(rows[-1]) if rows else None
        if skipped:
            training["skipped_steps"] = skipped
        provenance = _provenance(self.teacher, self.recipe, self.options.seed, data.summary)
        caveats = caveats_json(self.teacher)
        metadata, tensors = pack_model(self.student, self.recipe.to_json(), provenance, training, caveats)
        stage = decoder_error(self.teacher, metadata, tensors, data)
        if stage is not None:
            final = {"steps": decoder_rows[-1].step, "final": vars(decoder_rows[-1])} if decoder_rows else {}
            training["first_stage"] = {**stage, **final}
            form = StageForm.of(self.student, self.recipe.to_json())
            stage = {"keep": form.keep, "weights": form.weights, **metadata.get("first_stage", {}), **stage}
        trial = self.folder / "packed.bidm"
        if not self.options.trajectory_points:
            trial.unlink(missing_ok=True)  # of a run that was killed
            write_packed(out, metadata, tensors)
            return None, stage
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
        **({"skipped_steps": result.skipped} if result.skipped else {}),
    }
