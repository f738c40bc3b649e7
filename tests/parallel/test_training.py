"""Two and four processes train on the digits as one does, up to the order of float sums.

Compared are the changes of the averaged weights: a process that trains on the wrong rows changes them by
about as much as training does, the order of sums by thousands of times less. Signs of activations within
rounding of 0 turn with the size of a batch, so single weights differ by more than rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.distill import trainer as trainer_module
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.errors import BidmError
from bidm_cli.parallel.processes import Processes
from bidm_cli.parallel.share import Share
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from tests.cli.running import DEMO
from tests.distill.conftest import make_teacher
from tests.parallel.running import together

CASES = {
    "bidm": ("bidm", {}),
    "micro-batches": ("bidm", {"accumulate": 2, "checkpoint_activations": True}),
    "attention": ("w1a1-attention", {"progressive": 0.5}),
}
"""Recipe and changes of its ``train``; a small network with connections, SPD, planes, binary attention."""
STEPS, BATCH = 2, 9
SAME = 0.02
"""Largest difference of two changes of the weights, as a share of the change."""


def trainer_of(
    case: str,
    folder: Path,
    processes: Processes | None = None,
    reporter: Reporter = Reporter(),
    **train: object,
) -> Trainer:
    name, more = CASES[case]
    common = {"steps": STEPS, "batch_size": BATCH, "optimizer": "sgd", "lr": 0.05, "lr_binary": 0.05}
    common |= {"warmup": 0, "ema": 0.5, "schedule": "constant"}
    recipe = Recipe.load(name).override("train", **{**common, **more, **train})
    teacher = make_teacher()
    student = binarized_copy(teacher)
    if recipe.distill.predict != "teacher":
        student.prediction = recipe.distill.predict
    torch.manual_seed(0)
    binarize(student.unet, recipe, teacher.schedule.timesteps)
    data = ImageData(teacher, DEMO / "digits.npz", ConditionSet())
    return Trainer(teacher, student, recipe, data, folder, 7, reporter, processes)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value.detach().flatten().double() for value in trainer.ema.module.parameters()])


@cache
def alone(case: str, folder: Path, **train: object) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Weights before and after training in this process, and its log."""
    trainer = trainer_of(case, folder, **train)
    before = weights(trainer)
    trainer.train()
    return before, weights(trainer), (folder / "log.csv").read_text()


def difference(found: torch.Tensor, case: str, folder: Path) -> float:
    """Distance of ``found`` from what one process ends with, as a share of the training's change."""
    before, after, _ = alone(case, folder)
    return float((found - after).norm() / (after - before).norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(log: str) -> torch.Tensor:
    return torch.tensor([[float(value) for value in line.split(",")] for line in log.splitlines()[1:]])


def train_all(processes: Processes, folder: Path) -> None:
    """Each case; the first process keeps the weights, the others must have the same bits."""
    for case in CASES:
        trainer = trainer_of(case, folder / case, processes)
        trainer.train()
        own = weights(trainer)
        assert len(set(processes.gathered(own.sum().item()))) == 1
        if processes.is_first:
            torch.save(own, folder / f"{case}.pt")


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one(folder: Path, count: int) -> None:
    """9 rows for 2 or 4 processes: shares of different size; plain rows, micro-batches, blocks recomputed."""
    there = folder / str(count)
    together(count, lambda processes: train_all(processes, there))
    for case in CASES:
        found = torch.load(there / f"{case}.pt")
        assert difference(found, case, folder / "alone" / case) < SAME, case
        logs = [numbers((at / case / "log.csv").read_text()) for at in (there, folder / "alone")]
        torch.testing.assert_close(*logs, rtol=2e-3, atol=1e-5)
        written = {path.name.split(".")[0] for path in (there / case).iterdir()}
        assert written - {"events"} == {"checkpoint", "log"}, "by the first process alone"


def test_a_process_with_the_rows_of_another_is_seen(folder: Path) -> None:
    """The planted fault: both train on the first one's rows."""

    def work(processes: Processes) -> None:
        trainer = trainer_of("bidm", folder / "planted", processes)
        trainer.batches.share = Share(0, 2)
        trainer.train()
        if processes.is_first:
            torch.save(weights(trainer), folder / "planted.pt")

    together(2, work)
    assert difference(torch.load(folder / "planted.pt"), "bidm", folder / "alone" / "bidm") > 10 * SAME


class Stop(Exception):
    pass


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_SECONDS", -1.0)
    there = folder / f"{before}-{after}"

    def begin(processes: Processes) -> None:
        def stop(row: object) -> None:
            if trainer.step == 2:
                processes.wait()
                raise Stop

        trainer = trainer_of("bidm", there, processes, Reporter(advance=stop))
        with pytest.raises(Stop):
            trainer.train()

    def go_on(processes: Processes) -> None:
        # Micro-batches may change, too.
        trainer = trainer_of("bidm", there, processes, accumulate=2, checkpoint_activations=True)
        assert trainer.resume() and trainer.step == 1
        trainer.train()
        if processes.is_first:
            torch.save(weights(trainer), there / "found.pt")

    for count, work in ((before, begin), (after, go_on)):
        work(Processes()) if count == 1 else together(count, work)
    assert difference(torch.load(there / "found.pt"), "bidm", folder / "alone" / "bidm") < SAME
    rows = [numbers((at / "log.csv").read_text()) for at in (there, folder / "alone" / "bidm")]
    torch.testing.assert_close(*rows, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("more", [{"accumulate": 3}, {"checkpoint_activations": True}])
def test_micro_batches_and_recomputed_blocks_change_nothing(folder: Path, more: dict[str, object]) -> None:
    trainer = trainer_of("bidm", folder / str(more), **more)
    trainer.train()
    share = difference(weights(trainer), "bidm", folder / "alone" / "bidm")
    assert share == 0 if "checkpoint_activations" in more else share < SAME
    assert not any("forward" in vars(module) for module in trainer.student.unet.modules())


def test_recomputed_blocks_keep_less(folder: Path) -> None:
    kept = []
    for recompute in (False, True):
        trainer = trainer_of("bidm", folder / "kept", checkpoint_activations=recompute)
        sizes: list[int] = []

        def keep(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            trainer.train()
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_a_batch_too_small_is_one_clear_error(folder: Path) -> None:
    with pytest.raises(BidmError, match=r"batch of 2 images is too small.*`batch_size` of 3 or more"):
        trainer_of("bidm", folder / "small", batch_size=2, accumulate=3)
