"""Trial steps of a training that is not run: seconds and bytes of a step, measured on a few rows."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.condition import Condition, ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.parallel.recompute import recomputed
from bidm_cli.distill.prefetch import Prefetcher
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.distill.training_data import TrainingData
from bidm_cli.parallel.processes import Processes
from bidm_cli.parallel.share import Share
from bidm_cli.recipe import Recipe

ENOUGH_SECONDS = 5.0
"""Seconds after which no further trial step is made."""
TRIALS = 4
"""Steps after the first one, which allocates; the fastest counts."""


@dataclass(frozen=True)
class Trial:
    """Cost of a training step, by rows of its batch.

    Attributes:
        fixed: seconds per step for the optimizer and the averages, whatever the batch.
        per_row: seconds per row of the batch, teacher and student. encoding: more for a row that is an image
            that was not encoded before.
        weights: bytes of both networks, gradients, the optimizer's moments and the averages.
        kept: bytes that are kept for the gradients whatever the batch (signs of weights). kept_per_row: of
            every row that a process computes at a time.
        rows: that were tried together; 0 if none were. peak: highest memory of this process until then, with
            all that it has loaded; 0 where nothing says.
    """

    fixed: float
    per_row: float
    weights: int
    kept: int
    kept_per_row: int
    rows: int = 0
    peak: int = 0
    encoding: float = 0.0

    def bytes_of(self, rows: int, loaded: int) -> int:
        """Highest memory of a process that computes ``rows`` rows at a time.

        Args:
            loaded: bytes that the process takes before it trains.
        """
        if self.peak:
            return self.peak + self.kept_per_row * max(0, rows - self.rows)
        return loaded + self.weights + self.kept + self.kept_per_row * rows


class _Examples(TrainingData):
    """Noise under example conditions, as only shapes matter; with images that are encoded if asked for."""

    images: tuple[int, int, int] | None = None
    """(C, H, W) of an image to encode for each row; None for none."""

    def batch(
        self,
        indices: Tensor,
        generator: torch.Generator,
        share: Share = Share(),  # noqa: B008
    ) -> tuple[Tensor, Condition]:
        rows = len(share.of(indices))
        x0 = torch.randn(rows, *self.model.sample_shape, generator=generator).to(self.model.device)
        if self.images is not None:
            # One by one, as ImageData does.
            images = torch.zeros(rows, 1, *self.images, device=self.model.device)
            x0 += 1e-3 * torch.cat([self.model.encode(image) for image in images])
        return x0, self.model.example(rows)

    def _x0(self, indices: Tensor) -> Tensor:
        raise NotImplementedError


def try_steps(
    model: DiffusionModel,
    recipe: Recipe,
    rows: int,
    processes: Processes,
    images: tuple[int, int, int] | None = None,
) -> Trial:
    """Train a binarized copy of ``model`` for a few steps of ``rows`` rows in each process, and forget it.

    Args:
        images: (C, H, W) of the images to train on, where they have to be encoded.

    Raises:
        BidmError: a recipe that does not fit the network.
    """
    student = binarized_copy(model)
    if recipe.distill.predict != "teacher":
        student.prediction = recipe.distill.predict
    binarize(student.unet, recipe, model.schedule.timesteps)
    batch = rows * processes.size
    recipe = recipe.override("train", batch_size=batch, accumulate=1, steps=max(1, recipe.train.steps))
    data = _Examples(model, batch, None, ConditionSet())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, student, recipe, data, Path(folder), processes=processes)
        recomputes = recipe.train.checkpoint_activations
        with recomputed(student.unet) if recomputes else contextlib.nullcontext():
            kept, single = (_kept(trainer, n) for n in (rows, 1))
            seconds = _step_seconds(trainer)
            fixed = min(seconds, _fastest(lambda: _update(trainer), trainer))
            data.images = images
            encoding = max(0.0, _step_seconds(trainer) - seconds) / rows if images else 0.0
    per_row = single if rows == 1 else (kept - single) // (rows - 1)
    weights, peak = _weights(model.unet, trainer), peak_bytes(model.device)
    kept_anyway = max(0, single - per_row)
    return Trial(fixed, (seconds - fixed) / rows, weights, kept_anyway, per_row, rows, peak, encoding)


def _step_seconds(trainer: Trainer) -> float:
    """Seconds of a step, with the teacher's part prefetched as in training."""
    end = trainer.step + TRIALS + 2
    with Prefetcher(trainer.batches.targets, trainer.step, end, trainer.student.device) as prefetched:
        trainer._one_step(prefetched.take)
        return _fastest(lambda: trainer._one_step(prefetched.take), trainer)


def _update(trainer: Trainer) -> None:
    """The part of a step that does not depend on its batch."""
    nn.utils.clip_grad_norm_(trainer.student.unet.parameters(), trainer.settings.clip or math.inf)
    trainer.optimizer.step()
    trainer.ema.update(trainer.student.unet, step=1)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _fastest(run: Callable[[], None], trainer: Trainer) -> float:
    """Seconds of ``run``, the fastest of a few, which are as many in all processes."""
    times: list[float] = []
    while trainer.processes.from_first(len(times) < TRIALS and sum(times) < ENOUGH_SECONDS):
        times.append(_timed(run, trainer.student.device))
    return min(times)


def _kept(trainer: Trainer, rows: int) -> int:
    """Bytes of the tensors that a step of ``rows`` rows keeps for its gradients; parameters are left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.student.unet.parameters()}
    found: dict[int, Any] = {}  # with the storages themselves, so that no address is used twice

    def note(tensor: Tensor) -> None:
        # Not the tensor itself: an operation that keeps its own result would never be freed.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage

    generator = torch.Generator().manual_seed(0)
    x0, condition = trainer.data.batch(torch.arange(rows), generator)
    with trainer._autocast():
        draws = trainer.objective.draws(rows, condition, generator)
        targets = trainer.objective.prepare(x0, condition, draws)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainer.objective.losses(targets)
    return sum(storage.nbytes() for storage in found.values())


def _weights(teacher: nn.Module, trainer: Trainer) -> int:
    student = trainer.student.unet
    tensors = [*teacher.parameters(), *student.parameters(), *trainer.ema.module.parameters()]
    tensors += [p.grad for p in student.parameters() if p.grad is not None]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_bytes(device: torch.device) -> float:
    """Bytes of main memory, or of the GPU's, that a process can take now; infinite where nothing says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return _field("/proc/meminfo", "MemAvailable", math.inf)


def peak_bytes(device: torch.device) -> int:
    """Highest bytes that this process took so far, of main memory or of the GPU's; 0 where nothing says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return int(_field("/proc/self/status", "VmHWM", 0.0))


def resident_bytes(device: torch.device) -> int:
    """Bytes that this process takes now, as :func:`peak_bytes`."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(_field("/proc/self/status", "VmRSS", 0.0))


def _field(path: str, name: str, otherwise: float) -> float:
    """Bytes of a line "name: 123 kB" of a file of Linux."""
    try:
        fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
        return 1024.0 * int(fields[name].split()[0])
    except (OSError, ValueError, KeyError):
        return otherwise
