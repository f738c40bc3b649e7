"""Distillation loop: seeded by step, checkpointed atomically, resumable to the same bits on a CPU.

trainer = Trainer(teacher, student, recipe, data, run_dir=Path("runs/x"), seed=0)
trainer.resume()                        # if a checkpoint lies there
trainer.train()
trainer.ema.module                      # the network to pack
"""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from bidm_cli.binary.surgery import set_binary_share
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.fingerprint import differences
from bidm_cli.distill.log import LogRow, columns, tensorboard_writer, write_log
from bidm_cli.distill.loss_watch import LossWatch
from bidm_cli.distill.objective import Objective, TeacherTargets
from bidm_cli.distill.optimizer import amp_dtype, create_optimizer, create_scheduler
from bidm_cli.distill.parallel.batches import Batches
from bidm_cli.distill.parallel.recompute import recomputed
from bidm_cli.distill.parallel.replica import Replica
from bidm_cli.distill.parallel.step_seconds import LEAST_STEPS, StepSeconds, slow_processes
from bidm_cli.distill.prefetch import Prefetcher
from bidm_cli.distill.state_files import StateFiles
from bidm_cli.distill.training_data import TrainingData
from bidm_cli.errors import BidmError
from bidm_cli.interrupts import Interrupted, deferred_signals
from bidm_cli.parallel.place import ProcessLost
from bidm_cli.parallel.processes import Processes
from bidm_cli.parallel.share import Share
from bidm_cli.progress import Pace, Reporter
from bidm_cli.recipe import Optimization, Recipe

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT_EVERY_SECONDS = 60.0


class Trainer:
    """Distillation of ``student`` from ``teacher``; ``student.unet`` is trained, its EMA is ``ema.module``.

    Each step draws everything (which images, timesteps, noise) from a generator seeded by (seed, step), so a
    resumed run needs no random state. ``reporter`` is advanced once per step, with the log's new row, if any.
    ``skip_nan`` is that of :class:`LossWatch`. Of several ``processes`` each trains on its share of every
    batch and all hold the same weights; the first one writes.

    Attributes:
        row_type: record of the log's rows; its fields are the log's columns.
    """

    row_type: type[Any] = LogRow

    def __init__(
        self,
        teacher: DiffusionModel,
        student: DiffusionModel,
        recipe: Recipe,
        data: TrainingData,
        run_dir: Path,
        seed: int = 0,
        reporter: Reporter = Reporter(),
        skip_nan: int = 0,
        processes: Processes | None = None,
    ) -> None:
        self.student, self.recipe, self.data, self.run_dir, self.seed = student, recipe, data, run_dir, seed
        self.settings, self.reporter = self._settings_of(recipe), reporter
        self.processes = processes or Processes()
        teacher.unet.requires_grad_(False)
        # eval() throughout: dropout would draw from the global generator and teach the teacher's noise.
        student.unet.eval().requires_grad_(True)
        self.ema = ModelEmaV3(student.unet, decay=self.settings.ema, use_warmup=True)
        self.objective = self._objective(teacher, student)
        self.replica = Replica(student.unet, self.objective.losses, self.processes)
        share = Share(self.processes.rank, self.processes.size)
        self.batches = Batches(data, self.objective, self.settings, seed, share, self._autocast)
        # One process has none to wait for it.
        timed = student.device if self.processes.size > 1 else torch.device("cpu")
        self._seconds, self._slow = StepSeconds(timed), set[int]()
        self.optimizer = create_optimizer(student.unet, self.settings)
        self.scheduler = create_scheduler(self.optimizer, self.settings)
        self.amp = amp_dtype(self.settings.amp, student.device)
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=self.amp == torch.float16)
        self.step, self.rows = 0, list[Any]()
        self.watch = LossWatch(seed, skip_nan, scaled=self.scaler.is_enabled())
        self.states = StateFiles(run_dir, reporter.say)

    def _settings_of(self, recipe: Recipe) -> Optimization:
        """The recipe's section for this training."""
        return recipe.train

    def _objective(self, teacher: DiffusionModel, student: DiffusionModel) -> Any:
        """Teacher targets (``prepare``) and losses of a step, as :class:`Objective` has them."""
        return Objective(teacher, student, self.recipe)

    @property
    def checkpoint(self) -> Path:
        """File of the run's newest state."""
        return self.states.newest

    @property
    def log_every(self) -> int:
        """Steps between rows of the log: about 200 rows per run."""
        return max(1, self.settings.steps // 200)

    def train(self) -> None:
        """Run to the last step. Interrupted at any moment, :meth:`resume` continues from the last checkpoint.

        Raises:
            BidmError: the loss is no longer finite, data cannot be read, the state cannot be written, or
                another process was lost.
            Interrupted: a signal came; the state after the step under way is written.
        """
        saved, parts = time.monotonic(), self.settings.accumulate
        pace = Pace(self.settings.steps - self.step, self.reporter.pace)
        first, end, device = self.step * parts, self.settings.steps * parts, self.student.device
        writes, recomputes = self.processes.is_first, self.settings.checkpoint_activations
        with (
            deferred_signals() as stop,
            self._saved_if_lost(),
            tensorboard_writer(self.run_dir, self.step) if writes else contextlib.nullcontext() as board,
            recomputed(self.student.unet) if recomputes else contextlib.nullcontext(),
            Prefetcher(self.batches.targets, first, end, device) as prefetched,
        ):
            while self.step < self.settings.steps:
                self._one_step(lambda: self._taken(prefetched))
                self._log(board)
                pace.advance()
                if self.processes.any(bool(stop.signum)):
                    self.save()
                    signum = stop.signum or signal.SIGTERM  # it came to another process
                    raise Interrupted(f"stopped after step {self.step}; {self._go_on()}", signum)
                if time.monotonic() - saved > CHECKPOINT_EVERY_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _taken(self, prefetched: Prefetcher[TeacherTargets]) -> TeacherTargets:
        """The next micro-batch's targets; if its data cannot be read, the state is saved first.

        Raises:
            BidmError: what the data raised.
        """
        try:
            return prefetched.take()
        except BidmError as error:
            if self.step == 0:
                raise
            self.save()
            raise BidmError(f"{error}; {self._go_on()} when the data can be read") from error

    def _go_on(self) -> str:
        return f"the state after step {self.step} is saved in {self.run_dir}; continue with `resume`"

    @contextlib.contextmanager
    def _saved_if_lost(self) -> Iterator[None]:
        """Save the state if another process is lost, and say how to go on.

        Raises:
            ProcessLost: another process ended or cannot be reached.
        """
        try:
            with self.processes.watched():
                yield
        except ProcessLost as error:
            if self.step == 0:
                raise
            self.save()
            raise ProcessLost(f"{error}; {self._go_on()}") from error

    def _one_step(self, take: Callable[[], TeacherTargets]) -> None:
        """Student's half of a step on the targets that ``take`` gives: losses, gradients, and one step of the
        optimizer if they are finite.
        """
        set_binary_share(self.student.unet, binary_share(self.step, self.settings))
        self.optimizer.zero_grad(set_to_none=True)
        self._seconds.start()
        losses = sum(self._micro_batch(take(), part) for part in range(1, self.settings.accumulate + 1))
        assert isinstance(losses, torch.Tensor)
        losses = self.processes.sum(losses)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.student.unet.parameters(), self.settings.clip or math.inf)
        values = torch.cat([losses, norm.detach().float().reshape(1)])
        usable = self.watch.is_usable(self.step + 1, values)
        if usable:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.objective.connected and self.recipe.tbs is not None:
            self.student.unet.connections.project(self.recipe.tbs.limit)  # type: ignore[operator, union-attr]
        self.step += 1
        self.scheduler.step_update(self.step)
        if usable:
            self.ema.update(self.student.unet, step=self.step)
        else:
            self.reporter.say(f"step {self.step} is left out: its loss or gradient is not finite")

    def _micro_batch(self, targets: TeacherTargets, number: int) -> torch.Tensor:
        """Add a micro-batch's gradients; its losses [V], weighted by its rows."""
        is_last, weight = number == self.settings.accumulate, self.batches.weight(targets)
        with self.replica.exchanging(is_last):
            with self._autocast():
                losses = self.replica.losses(targets)
            if is_last:
                self._seconds.stop()
            # Replicas average their gradients, whose sum is wanted.
            self.scaler.scale(losses.total * (weight * self.processes.size)).backward()
        return torch.stack([value.detach().float() for value in vars(losses).values()]) * weight

    def _autocast(self) -> torch.autocast:
        enabled = self.amp is not None
        return torch.autocast(self.student.device.type, dtype=self.amp or torch.bfloat16, enabled=enabled)

    def _log(self, board: SummaryWriter | None) -> None:
        row = None
        if self.step % self.log_every == 0 or self.step == self.settings.steps:
            self.watch.check(self.step)
            if means := self.watch.take_means():
                row = self.row_type(self.step, *means, self.optimizer.param_groups[0]["lr"])
                self.rows.append(row)
                if self.processes.is_first:
                    write_log(self.run_dir, self.row_type, self.rows)
                if board is not None:
                    for name in columns(self.row_type)[1:]:
                        board.add_scalar(name, getattr(row, name), row.step)
            self._exchange_notes()
        self.reporter.advance(row)

    def _exchange_notes(self) -> None:
        """Say what the other processes have to say, and once for each which ones the others wait for."""
        if self.processes.size == 1:
            return
        for line in self.processes.take_notes():
            self.reporter.say(line)
        if self._seconds.steps < LEAST_STEPS:
            return
        seconds = self.processes.gathered(self._seconds.take())
        slow = slow_processes(seconds) if self.processes.is_first else {}
        for rank in slow.keys() - self._slow:
            self.reporter.say(
                f"{self.processes.name(rank)} is slow: {seconds[rank]:.3g} s per step of its own, "
                f"{slow[rank]:.1f} times the median of the others, who wait for it"
            )
        self._slow |= slow.keys()

    def _stateful(self) -> dict[str, Any]:
        return {
            "student": self.student.unet, "ema": self.ema.module,
            "optimizer": self.optimizer, "scaler": self.scaler,
        }  # fmt: skip

    def save(self) -> None:
        """Write the run's state, whole or not at all; only the first process does.

        Raises:
            BidmError: it cannot be written, or the loss is no longer finite, which no state may hold.
        """
        self.watch.check(self.step)
        if not self.processes.is_first:
            return
        state = {
            "step": self.step,
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "rows": [vars(row) for row in self.rows],
            "sums": list(self.watch.values),
            "skipped": list(self.watch.skipped),
            "recipe": self.recipe.to_json(),
            "seed": self.seed,
        }
        try:
            self.states.save(state)
        except BidmError as error:
            raise BidmError(f"{error}; continue with `resume` from the last state that was saved") from error

    def resume(self) -> bool:
        """Continue from the newest state of the run that is whole; False if there is none.

        Raises:
            BidmError: the state is of another recipe or seed, or none can be read.
        """
        state = self.states.load(self.student.device)
        if state is None:
            return False
        differing = differences(_deciding(state["recipe"]), _deciding(self.recipe.to_json()))
        if state["seed"] != self.seed:
            differing.append("seed")
        if differing:
            raise BidmError(
                f"{self.run_dir} was started with other settings ({', '.join(differing)}); resume with the "
                "same ones or choose another `run_dir`"
            )
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.rows = [self.row_type(**row) for row in state["rows"]]
        self.watch.values = list(state["sums"])
        self.watch.skipped = list(state.get("skipped", []))
        self.scheduler.step_update(self.step)
        return True


def _deciding(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's JSON without the keys that do not change the result."""

    def kept(train: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in train.items() if key not in Optimization.WITHOUT_EFFECT}

    stage = recipe.get("first_stage", {})
    if "train" in stage:
        recipe = {**recipe, "first_stage": {**stage, "train": kept(stage["train"])}}
    return {**recipe, "train": kept(recipe["train"])}


def binary_share(step: int, settings: Optimization) -> float:
    """Share l of the binary activation in what layers see at a step, 0 to 1 (``train.progressive``)."""
    growing = settings.progressive * settings.steps
    return min(1.0, step / growing) if growing > 0 else 1.0


def binarized_copy(teacher: DiffusionModel) -> DiffusionModel:
    """Copy of the teacher with a network of its own, everything else shared; binarize its ``unet``."""
    student = copy.copy(teacher)
    student.unet = copy.deepcopy(teacher.unet)
    return student
