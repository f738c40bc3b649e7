"""A loss that is not finite: the run stops with step and seed, or leaves the step out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bidm_cli.distill import trainer as trainer_module
from bidm_cli.distill.loss_watch import LossWatch
from bidm_cli.distill.objective import Objective
from bidm_cli.distill.trainer import Trainer
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter
from tests.distill.conftest import images  # noqa: F401
from tests.distill.test_trainer import make_trainer, weights


@pytest.fixture
def nan_at(monkeypatch):
    """``nan_at(2, 3)``: the losses of these steps, numbered from 1, are NaN."""

    def plant(*steps: int, value: float = float("nan")):
        losses, one_step, now = Objective.losses, Trainer._one_step, [0]

        def counted(trainer, targets):
            now[0] = trainer.step + 1
            return one_step(trainer, targets)

        def planted(objective, targets):
            found = losses(objective, targets)
            return replace(found, total=found.total * value) if now[0] in steps else found

        monkeypatch.setattr(Trainer, "_one_step", counted)
        monkeypatch.setattr(Objective, "losses", planted)

    return plant


def finite(trainer: Trainer) -> bool:
    networks = (trainer.student.unet, trainer.ema.module)
    return all(bool(torch.isfinite(p).all()) for network in networks for p in network.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_stops_at_the_very_step_and_names_it_with_the_seed(
    value,
    images,  # noqa: F811
    tmp_path,
    nan_at,
    monkeypatch,
):
    nan_at(3, value=value)
    monkeypatch.setattr(Trainer, "log_every", 5)
    trainer = make_trainer(images, tmp_path, steps=5, seed=7)
    with pytest.raises(BidmError, match=r"no longer finite at step 3 \(seed 7\).*`resume` with `skip_nan`"):
        trainer.train()
    assert not trainer.checkpoint.exists()


def test_no_state_holds_weights_that_are_not_finite_and_the_one_before_goes_on(
    images, tmp_path, nan_at, monkeypatch  # noqa: F811
):  # fmt: skip
    nan_at(3)
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(Trainer, "log_every", 6)
    with pytest.raises(BidmError, match="at step 3"):
        make_trainer(images, tmp_path, steps=6).train()
    said: list[str] = []
    again = make_trainer(images, tmp_path, steps=6, skip_nan=1, reporter=Reporter(say=said.append))
    assert again.resume() and again.step == 2 and finite(again)
    again.train()
    assert again.step == 6 and again.watch.skipped == [3] and finite(again)
    assert said == ["step 3 is left out: its loss or gradient is not finite"]
    assert [row.step for row in again.rows] == [6]


def test_a_step_that_is_left_out_changes_nothing(images, tmp_path, nan_at):  # noqa: F811
    nan_at(2)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def note(row):
        kept[trainer.step] = {name: value.clone() for name, value in weights(trainer).items()}
        rows.append(row)

    rows: list[object] = []
    trainer = make_trainer(images, tmp_path, steps=3, skip_nan=1, reporter=Reporter(advance=note))
    trainer.train()
    assert all(torch.equal(kept[1][name], value) for name, value in kept[2].items())
    assert any(not torch.equal(kept[2][name], value) for name, value in kept[3].items())
    assert rows[1] is None and [row.step for row in trainer.rows] == [1, 3]


def test_more_in_a_row_than_allowed_stop_the_run(images, tmp_path, nan_at):  # noqa: F811
    nan_at(1, 3, 4, 5)
    trainer = make_trainer(images, tmp_path, steps=6, skip_nan=2)
    with pytest.raises(BidmError, match=r"at step 5 .*nor at the 2 steps before"):
        trainer.train()
    assert trainer.watch.skipped == [1, 3, 4, 5]


def test_a_gradient_that_is_not_finite_is_found_before_it_reaches_the_weights(images, tmp_path):  # noqa: F811
    trainer = make_trainer(images, tmp_path, steps=2, skip_nan=5)
    trainer.student.unet.conv_in.weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train()
    assert trainer.watch.skipped == [1, 2] and finite(trainer) and trainer.rows == []


def test_in_float16_the_scaler_is_in_charge_of_the_gradient():
    values = torch.tensor([1.0, 1.0, 1.0, float("inf")])
    assert LossWatch(0, skip_nan=1, scaled=True).is_usable(1, values)
    assert not LossWatch(0, skip_nan=1).is_usable(1, values)
    watch = LossWatch(0, scaled=True)
    assert watch.is_usable(1, values)
    watch.check(1)


def test_skipped_steps_are_counted_in_file_result_and_text(images, tmp_path, nan_at, monkeypatch):  # noqa: F811
    from bidm_cli.cli.compress import _print_result
    from bidm_cli.distill.compress import compress
    from bidm_cli.packed.format.container import read_packed
    from bidm_cli.recipe import Recipe
    from tests.distill.conftest import TINY, make_teacher

    nan_at(2)
    out, options = tmp_path / "x.bidm", {"data": images, "run_dir": tmp_path / "run", "trajectory_points": 0}
    result = compress(make_teacher(), Recipe.parse(TINY), out, skip_nan=3, **options)
    assert result.skipped == 1 and read_packed(out)[0]["training"]["skipped_steps"] == 1
    assert '"skipped_steps": 1' in (tmp_path / "run" / "result.json").read_text()
    lines: list[str] = []
    monkeypatch.setattr("bidm_cli.cli.compress.echo", lines.append)
    _print_result(result)
    assert lines[1].startswith("1 training steps were left out")
