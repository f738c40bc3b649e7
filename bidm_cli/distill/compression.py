"""One compression under way: its networks, and all that is done with them in a run's folder."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from dataclasses import dataclass
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
from bidm_cli.distill.log import LogRow
from bidm_cli.distill.options import CompressOptions
from bidm_cli.distill.runs import RECIPE, removed_if_refused, write_recipe, write_result
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.distill.training_data import TrainingData
from bidm_cli.distill.trajectory import trajectory_error, trajectory_images
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.first_stage import StageForm
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.parallel.processes import Processes
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.version import __version__


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


@dataclass(frozen=True)
class Networks:
    """The networks of a compression, and the conditions that they are trained with.

    Attributes:
        source: the checkpoint's file, if it has one. teacher: the original, on the device of the run.
        student: a copy with the binary network. layers: decision on each of its layers.
        decoder: of the first stage, if it is to be binary. conditions: that training draws from.
    """

    source: Any
    teacher: DiffusionModel
    student: DiffusionModel
    layers: list[LayerPlan]
    decoder: BinaryDecoder | None
    conditions: ConditionSet

    @classmethod
    def of(
        cls, model: DiffusionModel, recipe: Recipe, options: CompressOptions, conditions: ConditionSource
    ) -> Networks:
        """Binarize a copy of the model as the recipe says.

        Raises:
            BidmError: a recipe or conditions that do not go with the model.
        """
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
        if decoder is not None:
            check_optimizer(decoder, recipe)
        return cls(source, model, student, layers, decoder, gathered)


@dataclass(frozen=True)
class Compression:
    """One compression with all settled; :meth:`run` does it, and continues one that was stopped."""

    networks: Networks
    recipe: Recipe
    out: Path
    folder: Path
    options: CompressOptions
    reporter: Reporter
    processes: Processes

    def run(self) -> CompressResult:
        """Train, pack, measure, and write the packed file; every process of the run does its share.

        Raises:
            BidmError: data or a folder that cannot be used, or a loss that is no longer finite.
            Interrupted: a signal came; the state is written.
        """
        started, first = time.monotonic(), self.processes.is_first
        with removed_if_refused(self.folder) if first else contextlib.nullcontext():
            data, summary = self._open_data()
            if first:
                self.reporter.begin(self._planned(summary))
            data = self._draw() if data is None else data
            rows, skipped = self._train(data)
            decoder_rows = self._train_decoder(data)
        packed = self._pack(rows, decoder_rows, skipped, data) if first else (None, None)
        self.processes.wait()
        trajectory, stage = self.processes.from_first(list(packed))
        seconds, layers = time.monotonic() - started, self.networks.layers
        result = CompressResult(self.out, self.folder, layers, trajectory, rows, seconds, stage, skipped)
        if first:
            write_result(self.folder, _result_json(result, self.networks.source))
        return result

    def _planned(self, data: DataSummary) -> PlannedRun:
        networks = self.networks
        decoder = [] if networks.decoder is None else networks.decoder.layers
        return PlannedRun(
            networks.teacher, self.recipe, networks.layers, decoder, data.line(), self.out, self.folder,
            self.options,
        )  # fmt: skip

    def _open_data(self) -> tuple[TrainingData | None, DataSummary]:
        """The user's training data, None if they are to be drawn, and what they are.

        The run's records are written once the data are known to be good.
        """
        recipe, folder, options, reporter = self.recipe, self.folder, self.options, self.reporter
        for line in self.networks.conditions.notes:
            reporter.say(line)
        if self.networks.decoder is None and recipe.first_stage.is_binary:
            reporter.say("first_stage.layers of the recipe are of no use: this model has no decoder at hand")
        data = open_data(self.networks.teacher, options, self.networks.conditions, reporter)
        summary = synthetic_plan(self.networks.teacher, recipe.train) if data is None else data.summary
        if self.processes.is_first:
            check_same_run(folder, self.networks.teacher, self.networks.conditions, options.resume)
            check_same_data(folder, summary, options.resume)
            write_recipe(folder, recipe, replace=not options.resume)
        self.processes.check_shared(folder / RECIPE)
        self.processes.check_same(_settings_in_short(recipe, summary, options.seed))
        self.processes.notes.clear()  # the first has said the same
        return data, summary

    def _draw(self) -> TrainingData:
        """Samples of the original as training data."""
        train, seed, networks = self.recipe.train, self.options.seed, self.networks
        return draw_synthetic(
            networks.teacher, train, networks.conditions, self.folder, seed, self.reporter, self.processes
        )

    def _train(self, data: TrainingData) -> tuple[list[LogRow], int]:
        """Distil the student to the last step and give it the averaged weights.

        Returns (rows of the log, number of steps that were left out).
        """
        recipe, folder, options, reporter = self.recipe, self.folder, self.options, self.reporter
        reporter.stage("distil", recipe.train.steps)
        teacher, student, skip_nan = self.networks.teacher, self.networks.student, options.skip_nan
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
        self.networks.student.unet = trainer.ema.module
        return trainer.rows, len(trainer.watch.skipped)

    def _train_decoder(self, data: TrainingData) -> list[DecoderRow]:
        """Distil the first stage's decoder, if it is to be binary, for the student; rows of its log."""
        networks, options = self.networks, self.options
        if networks.decoder is None:
            return []
        networks.student.first_stage, rows = distil_decoder(
            networks.teacher, networks.decoder, self.recipe, data, self.folder, options.seed, options.resume,
            self.reporter, options.skip_nan, self.processes,
        )  # fmt: skip
        return rows

    def _pack(
        self, rows: list[LogRow], decoder_rows: list[DecoderRow], skipped: int, data: TrainingData
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Pack, measure, and write the packed file with these measurements inside.

        Returns (trajectory error, form and error of the first stage).
        """
        networks = self.networks
        training: dict[str, Any] = {"rows": [vars(row) for row in rows[:: max(1, len(rows) // 50)]]}
        training["final"] = vars(rows[-1]) if rows else None
        if skipped:
            training["skipped_steps"] = skipped
        provenance = _provenance(networks.teacher, self.recipe, self.options.seed, data.summary)
        caveats = caveats_json(networks.teacher)
        metadata, tensors = pack_model(networks.student, self.recipe.to_json(), provenance, training, caveats)
        stage = decoder_error(networks.teacher, metadata, tensors, data)
        if stage is not None:
            final = {"steps": decoder_rows[-1].step, "final": vars(decoder_rows[-1])} if decoder_rows else {}
            training["first_stage"] = {**stage, **final}
            form = StageForm.of(networks.student, self.recipe.to_json())
            stage = {"keep": form.keep, "weights": form.weights, **metadata.get("first_stage", {}), **stage}
        trial = self.folder / "packed.bidm"
        if not self.options.trajectory_points:
            trial.unlink(missing_ok=True)  # of a run that was killed
            write_packed(self.out, metadata, tensors)
            return None, stage
        write_packed(trial, metadata, tensors)
        trajectory = self._trajectory(trial)
        metadata = {**metadata, "training": {**training, "trajectory_error": trajectory}}
        write_packed(self.out, metadata, tensors)
        trial.unlink()
        return trajectory, stage

    def _trajectory(self, path: Path) -> dict[str, Any]:
        """Trajectory error of the packed file at ``path``."""
        networks = self.networks
        packed = load_packed(path, device=str(networks.teacher.device))
        packed.warm_up(self.reporter.compiling)
        points, images = self.options.trajectory_points, trajectory_images(networks.teacher)
        points = min(points, networks.teacher.schedule.timesteps)
        self.reporter.say(
            f"trajectory error: the original and the packed network are run on {images} images at {points} "
            "points of the schedule (`trajectory_points`)"
        )
        self.reporter.stage("measure the trajectory error", points)
        return trajectory_error(
            networks.teacher,
            packed,
            images,
            points,
            self.options.seed,
            networks.conditions,
            self.reporter,
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
