"""Distillation of a binary decoder: the loop of :class:`bidm_cli.distill.trainer.Trainer` on another network.

Its state and log lie in the folder ``first-stage`` of the run, so that both trainings resume by themselves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidm_cli.binary.first_stage import BinaryDecoder
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.first_stage.objective import DecoderObjective
from bidm_cli.distill.optimizer import create_optimizer
from bidm_cli.distill.trainer import Trainer
from bidm_cli.distill.training_data import TrainingData
from bidm_cli.errors import BidmError
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.networks.stored_precision import in_float32
from bidm_cli.parallel.processes import Processes
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Optimization, Recipe

FOLDER = "first-stage"
"""Folder of the decoder's training within that of the run."""


@dataclass
class DecoderRow:
    """Row of the decoder's log: means over the steps since the row before."""

    step: int
    loss: float
    pixel_loss: float
    gradient_loss: float
    gradient_norm: float
    lr: float

    def losses_text(self) -> str:
        """The losses in words, for a line of progress."""
        return f"loss {self.loss:.4f} (pixels {self.pixel_loss:.4f}, edges {self.gradient_loss:.4f})"


class DecoderTrainer(Trainer):
    """Distillation of a decoder; as in its base, ``unet`` is the network that is trained."""

    row_type = DecoderRow

    def _settings_of(self, recipe: Recipe) -> Optimization:
        return recipe.first_stage.train

    def _objective(self, teacher: DiffusionModel, student: DiffusionModel) -> Any:
        decoder = student.unet
        if isinstance(decoder, FirstStage) and decoder.quantize is not None:
            # The original's codes: with others, latents would be rounded to other ones.
            decoder.quantize.requires_grad_(False)
        return DecoderObjective(teacher, student, self.recipe.first_stage.train)


def check_optimizer(decoder: BinaryDecoder, recipe: Recipe) -> None:
    """Raise BidmError for an optimizer that there is not, before the network is trained for hours."""
    try:
        create_optimizer(decoder.network, recipe.first_stage.train)
    except BidmError as error:
        raise BidmError(f"{recipe.where('first_stage.train.optimizer')}: first_stage.{error}") from error


def distil_decoder(
    model: DiffusionModel,
    decoder: BinaryDecoder,
    recipe: Recipe,
    data: TrainingData,
    run_dir: Path,
    seed: int,
    resume: bool,
    reporter: Reporter,
    skip_nan: int = 0,
    processes: Processes | None = None,
) -> tuple[FirstStage, list[DecoderRow]]:
    """(the first stage with its distilled decoder and the original's encoder, rows of the log).

    Args:
        model: the original. decoder: the binary one, which is trained. run_dir: of the whole run.
        skip_nan, processes: as :class:`Trainer` has them.

    Raises:
        BidmError: as :meth:`Trainer.train` and :meth:`Trainer.resume`.
    """
    original = model.first_stage
    assert isinstance(original, FirstStage)
    teacher, student = copy.copy(model), copy.copy(model)
    teacher.unet, student.unet = in_float32(original).without_encoder(), decoder.network
    reporter.stage("distil the first stage's decoder", recipe.first_stage.train.steps)
    folder = run_dir / FOLDER
    if processes is None or processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    trainer = DecoderTrainer(teacher, student, recipe, data, folder, seed, reporter, skip_nan, processes)
    if resume and trainer.resume():
        for _ in range(trainer.step):
            reporter.advance(None)
    trainer.train()
    trained = trainer.ema.module
    assert isinstance(trained, FirstStage)
    trained.take_encoder(original)
    return trained, trainer.rows
