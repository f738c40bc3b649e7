"""Plan of a compression that is not run: binarized layers, and memory and time of the training."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bidm_cli.data.concat import image_shape
from bidm_cli.data.condition_files import ConditionSource
from bidm_cli.data.summary import DataSummary
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.data import open_data, synthetic_plan, training_conditions
from bidm_cli.distill.latents_cache import has_latents
from bidm_cli.distill.training_data import DataOptions
from bidm_cli.distill.trajectory import TRAJECTORY_POINTS, trajectory_images
from bidm_cli.parallel.processes import Processes
from bidm_cli.recipe import Recipe
from bidm_cli.report.cost.trace import example_inputs
from bidm_cli.report.inspection import Inspection
from bidm_cli.report.pages.tables import bytes_text, duration_text
from bidm_cli.report.trial import Trial, free_bytes, resident_bytes, try_steps

# Forward passes' worth of time per sample of a training step: the teacher once, the student's forward (about
# 1.5 of the teacher's: scale maps and shortcuts) and backward (twice that), and with connections the teacher
# and the student once more at the step before.
PASSES, PASSES_CONNECTED = 1 + 1.5 * 3, 2 + 1.5 * 4
# Share of the free memory that a step which is only tried may take.
ROOM = 0.5
# Copies per parameter: teacher, student, gradient, two moments of Adam, EMA; float32.
COPIES = 6
# Of every layer's output in the student's graph: itself, its input's signs, map and shortcut terms.
GRAPH_COPIES = 5


def describe(
    model: DiffusionModel,
    recipe: Recipe,
    path: Path,
    options: DataOptions = DataOptions(),
    conditions: ConditionSource = ConditionSource(),
    processes: int = 1,
    here: Processes | None = None,
) -> str:
    """Describe layers, savings, data, memory and time as text. Nothing is written; a few steps are tried.

    Args:
        processes: number that would share each batch, all on this machine.
        here: as many that try the steps together; without them this one tries its share alone.

    Raises:
        BidmError: a recipe that does not fit the network, or data that training would refuse.
    """
    inspection, here = Inspection.of(model, path, recipe), here or Processes()
    data = _data(model, recipe, options, conditions)
    training = [f"  data     {data.line()}", *_training(model, recipe, inspection, processes, here, data)]
    return "\n".join([inspection.to_text(layers=True), "", "Training", *training])


def _data(
    model: DiffusionModel, recipe: Recipe, options: DataOptions, conditions: ConditionSource
) -> DataSummary:
    """Summary of the data, opened as training opens them; examples stand in for missing conditions."""
    if options.data is None:
        return synthetic_plan(model, recipe.train)
    if conditions == ConditionSource():
        example = model.example(1)
        gathered = ConditionSet(None if model.embeds_labels else example.context, example.concat)
    else:
        model, gathered = training_conditions(model, conditions, options.data)
    data = open_data(model, options, gathered)
    assert data is not None
    return data.summary


def _training(
    model: DiffusionModel,
    recipe: Recipe,
    inspection: Inspection,
    processes: int,
    here: Processes,
    data: DataSummary,
) -> list[str]:
    train = recipe.train
    rows = math.ceil(train.batch_size / processes)
    micro = math.ceil(rows / train.accumulate)
    # Without a trial: what is here now, the original's weights among it.
    loaded = resident_bytes(model.device) or _bytes(model.first_stage)
    images = image_shape(model) if data.kind == "images" and has_latents(model) else None
    with _threads_of_one(processes // here.size, model.device):
        trial, how = _trial(model, recipe, inspection, micro, here, images)
    kept, total = trial.kept + trial.kept_per_row * micro, trial.bytes_of(micro, loaded)
    rest = max(0, total - trial.weights - kept)
    each = " in each process" if processes > 1 else ""
    return [
        f"  {train.steps:,} steps of {train.batch_size} on {model.device}, {train.optimizer}"
        + _parts_text(recipe, rows, micro, processes),
        f"  memory   about {bytes_text(total)}{each}: weights, gradients, moments and averages "
        f"{bytes_text(trial.weights)}, activations {bytes_text(kept)}, the program, first stage and buffers "
        f"{bytes_text(rest)}",
        f"  time     {_time_text(model, recipe, inspection, trial, rows, data)} ({how})",
        *_decoder_training(model, recipe, inspection),
    ]


def _time_text(
    model: DiffusionModel,
    recipe: Recipe,
    inspection: Inspection,
    trial: Trial,
    rows: int,
    data: DataSummary,
) -> str:
    """Words on the time of a step, of all with the encoding of images, and of the trajectory error."""
    steps, drawn = recipe.train.steps, recipe.train.steps * recipe.train.batch_size
    step = trial.fixed + trial.per_row * rows
    # Images are drawn at random, so some are drawn twice before others are drawn once.
    encoded = data.count * -math.expm1(-drawn / data.count)
    encoding = trial.encoding * encoded * rows / recipe.train.batch_size
    more = f" with {duration_text(encoding)} to encode {encoded:,.0f} images" if encoding else ""
    images, points = trajectory_images(model), min(TRAJECTORY_POINTS, model.schedule.timesteps)
    passes = PASSES_CONNECTED if inspection.connected else PASSES
    measure = trial.per_row / passes * 2 * points * images
    return (
        f"about {duration_text(step)} per step, {duration_text(step * steps + encoding)} in all{more}, "
        f"{duration_text(measure)} for the trajectory error"
    )


def _decoder_training(model: DiffusionModel, recipe: Recipe, inspection: Inspection) -> list[str]:
    """Line on the distillation of a binary decoder; none without one."""
    if inspection.cost.decoder is None or model.first_stage is None:
        return []
    train = recipe.first_stage.train
    batch = min(train.batch_size, trajectory_images(model))
    z = torch.zeros(batch, *model.sample_shape, device=model.device)
    forward = _seconds(lambda: model.decode(z)) / batch
    step = forward * train.batch_size * PASSES
    return [
        f"  decoder  {train.steps:,} steps of {train.batch_size}, about {duration_text(step)} per step, "
        f"{duration_text(step * train.steps)} in all (from one float decoding of {duration_text(forward)})"
    ]


def _parts_text(recipe: Recipe, rows: int, micro: int, processes: int) -> str:
    """Words on how a batch is shared out, and what the processes exchange."""
    if processes == 1 and recipe.train.accumulate == 1:
        return ""
    parts = f"; {processes} processes of {rows} rows" if processes > 1 else ""
    parts += f"; micro-batches of {micro}" if recipe.train.accumulate > 1 else ""
    return parts


def _trial(
    model: DiffusionModel,
    recipe: Recipe,
    inspection: Inspection,
    rows: int,
    here: Processes,
    images: tuple[int, int, int] | None,
) -> tuple[Trial, str]:
    """Cost of a step, and how it was found: tried where there is room, else from one float pass."""
    rows = min(rows, trajectory_images(model))
    rough = _from_float_pass(model, inspection, rows)
    needed = (rough.weights + rough.kept_per_row * rows) * here.size
    free = free_bytes(model.device)
    if here.from_first(needed > ROOM * free):
        return rough, (
            f"from one float pass; trying a step takes {bytes_text(needed)}, {bytes_text(free)} are free"
        )
    together = f", in {here.size} processes at once" if here.size > 1 else ""
    trial = try_steps(model, recipe, rows, here, images)
    return trial, f"from steps of {rows} rows that were tried{together}"


def _from_float_pass(model: DiffusionModel, inspection: Inspection, rows: int) -> Trial:
    cost = inspection.cost
    outputs = sum(math.prod(layer.output) for layer in cost.layers if layer.output)
    passes = PASSES_CONNECTED if inspection.connected else PASSES
    weights = cost.parameters * 4 * COPIES
    return Trial(0.0, _seconds_per_sample(model, rows) * passes, weights, 0, outputs * 4 * GRAPH_COPIES)


@contextlib.contextmanager
def _threads_of_one(processes: int, device: torch.device) -> Iterator[None]:
    """While open, compute with the threads that each of ``processes`` has on this machine's CPU."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, threads // processes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _seconds_per_sample(model: DiffusionModel, batch: int) -> float:
    """Seconds per sample of one float pass of a batch, the better of two passes after one to warm up."""
    inputs = [
        None if i is None else torch.zeros(batch, *i.shape[1:], dtype=i.dtype, device=model.device)
        for i in example_inputs(model)
    ]
    return _seconds(lambda: model.denoise(*inputs)) / batch  # type: ignore[arg-type]


def _seconds(run: Callable[[], object]) -> float:
    """Seconds that a call takes, the better of two after one to warm up."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _bytes(module: torch.nn.Module | None) -> int:
    """Bytes of a module in float32, which it computes in, whatever its file holds."""
    return 0 if module is None else sum(4 * p.numel() for p in module.parameters())
