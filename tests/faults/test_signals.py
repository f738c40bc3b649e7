"""Signals: the state is written, and the message says how to go on."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from bidm_cli.interrupts import SIGNALS, Interrupted, deferred_signals, explained, raising_signals
from bidm_cli.progress import Reporter
from tests.distill.conftest import images  # noqa: F401
from tests.distill.test_trainer import make_trainer, weights
from tests.faults.processes import Started, done
from tests.faults.work import TRAIN, WORKS, begin, content


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_in_training_writes_the_state_and_says_how_to_go_on(signum, images, tmp_path):  # noqa: F811
    handlers = [signal.getsignal(one) for one in SIGNALS]

    def interrupt(row):
        if trainer.step == 2:
            send(signum)

    trainer = make_trainer(images, tmp_path / "run", reporter=Reporter(advance=interrupt))
    with pytest.raises(Interrupted, match=r"stopped after step 2; .*continue with `resume`") as stopped:
        trainer.train()
    assert stopped.value.signum == signum and [signal.getsignal(one) for one in SIGNALS] == handlers
    again = make_trainer(images, tmp_path / "run")
    assert again.resume() and again.step == 2
    again.train()
    whole = make_trainer(images, tmp_path / "whole")
    whole.train()
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), deferred_signals() as stop:
        send(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        send(signal.SIGINT)
        pytest.fail("still here")


def test_what_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raising_signals(), deferred_signals() as stop:
            send(signal.SIGHUP)
        assert not stop.signum and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_gets_one_message_and_keeps_its_signal():
    with (
        pytest.raises(Interrupted) as stopped,
        explained(lambda: "outer"),
        explained(lambda: "inner"),
        raising_signals(),
    ):
        send(signal.SIGTERM)
    assert (stopped.value.message, stopped.value.signum) == ("inner", signal.SIGTERM)
    with pytest.raises(Interrupted, match="outer") as stopped, explained(lambda: "outer"):
        raise KeyboardInterrupt
    assert stopped.value.signum == signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_bidm_compress_ends_with_the_way_to_go_on_and_status_128_more(signum, whole, tmp_path):
    work = WORKS[0]
    begin(work, whole, folder := tmp_path / "here")
    run = Started(work.words, folder)
    os.kill(run.when(lambda: (folder / "run" / "log.csv").exists()), signum)
    status, printed = run.end()
    last = printed.strip().splitlines()[-1]
    assert status == 128 + signum and last.startswith("Interrupted: stopped after step"), printed
    assert "continue with --resume" in last and "Traceback" not in printed
    done((*work.words, *work.again), folder)
    assert content(folder, work) == content(whole, work)


@pytest.mark.slow
def test_bidm_sample_ends_with_the_number_of_images_that_are_there(whole, tmp_path):
    work = WORKS[2]
    begin(work, whole, folder := tmp_path / "here")
    run = Started(work.words, folder)
    os.kill(run.when(lambda: (folder / "samples" / "000000.png").exists()), signal.SIGTERM)
    status, printed = run.end()
    if status != 0:  # else it was done before the signal
        assert status == 128 + signal.SIGTERM and "of 16 images are in samples" in printed, printed
    done(work.words, folder)
    assert content(folder, work) == content(whole, work)


@pytest.mark.slow
def test_before_anything_is_written_there_is_nothing_to_continue(whole, tmp_path):
    begin(WORKS[0], whole, folder := tmp_path / "here")
    run = Started(TRAIN, folder)
    os.kill(run.when(lambda: run.log.exists()), signal.SIGTERM)
    status, printed = run.end()
    assert status in (128 + signal.SIGTERM, -signal.SIGTERM) and "Traceback" not in printed
