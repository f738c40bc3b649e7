"""Messages between processes, files that not all see, other data on another machine, slow processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from bidm_cli.distill.parallel.step_seconds import StepSeconds, slow_processes
from bidm_cli.errors import BidmError
from bidm_cli.parallel import processes as processes_module
from bidm_cli.parallel.place import ProcessLost
from bidm_cli.parallel.processes import Processes, device_of, joined
from bidm_cli.parallel.share import Share
from tests.parallel.running import together


def speak(processes: Processes) -> None:
    rank = processes.rank
    assert processes.gathered({"rank": rank, "text": "ä" * rank}) == [
        {"rank": i, "text": "ä" * i} for i in range(3)
    ]
    assert processes.from_first([rank, "x" * 1000]) == [0, "x" * 1000]
    assert processes.any(rank == 2) and not processes.any(False)
    assert processes.sum(torch.tensor([1.0, rank])).tolist() == [3.0, 3.0]
    processes.notes += ["same", f"own {rank}"] if rank else []
    noted = ["process 1: same", "process 1: own 1", "process 2: own 2"]
    assert sorted(processes.take_notes()) == (sorted(noted) if processes.is_first else [])
    assert processes.notes == []
    processes.check_same({"seed": 1})
    with pytest.raises(
        BidmError, match=r"process 1 has another number of samples than process 0 \(6, not 5\)"
    ):
        processes.check_same({"seed": 1, "number of samples": 5 + (rank > 0)})


def test_processes_speak_to_each_other() -> None:
    together(3, speak)


def test_alone_all_is_said_to_oneself(tmp_path: Path) -> None:
    with joined("cpu") as alone:
        assert alone.is_first and alone.gathered(3) == [3] and alone.from_first("x") == "x"
        assert alone.any(True) and not alone.any(False)
        alone.wait()
        alone.check_shared(tmp_path / "not there")


def test_a_folder_that_another_machine_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has a path of its own here; the one of the second is empty."""
    monkeypatch.setattr(processes_module, "SEEN_WITHIN", 0.1)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "recipe.yaml").touch()

    def work(processes: Processes) -> None:
        with pytest.raises(BidmError, match=r"recipe.yaml.*is not seen by process 1;.*the same folder"):
            processes.check_shared(tmp_path / str(processes.rank) / "recipe.yaml")

    together(2, work)


def test_a_late_file_is_waited_for(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        path = tmp_path / "late"
        if processes.is_first:
            processes.wait()
            time.sleep(0.3)
            path.touch()
            assert all(processes.gathered(True))
        else:
            processes.check_shared(path)

    together(2, work)


def test_a_process_that_is_gone_is_noticed() -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 1:
            raise SystemExit(5)
        with pytest.raises(ProcessLost, match="process 0: another process of the run ended"):
            processes.gathered("x")
        raise SystemExit(5)

    together(2, work, expected=5)


def test_what_is_no_loss_of_a_process_is_raised_as_it_is() -> None:
    processes = Processes()
    for error in (RuntimeError("gloo"), torch.OutOfMemoryError("NCCL")):
        with pytest.raises(type(error)) as found, processes.watched():
            raise error
        assert found.value is error
    processes.size = 2
    with pytest.raises(RuntimeError, match="shape") as found, processes.watched():
        raise RuntimeError("shape mismatch")
    assert not isinstance(found.value, BidmError)


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda") == torch.device("cuda:1") == chosen[0]
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(BidmError, match="cannot share cuda:0"):
        device_of("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BidmError, match=r"2 processes on .* and 1 GPUs"):
        device_of("cuda")


def test_shares_are_disjoint_and_whole() -> None:
    rows = torch.arange(11)
    for count in (1, 2, 4):
        parts = [Share(i, count).of(rows) for i in range(count)]
        assert sorted(torch.cat(parts).tolist()) == rows.tolist()
        for plain in range(12):
            shares = [Share(i, count).rows(plain) for i in range(count)]
            assert sum(shares) == plain and max(shares) - min(shares) <= 1
            assert all(int((part < plain).sum()) == n for part, n in zip(parts, shares, strict=True))
            assert all((part[:n] < plain).all() for part, n in zip(parts, shares, strict=True))


def test_a_slow_process_is_found() -> None:
    assert slow_processes([1.0, 1.1, 0.9, 2.0]) == {3: 2.0}
    assert slow_processes([1.0, 1.4]) == {} and slow_processes([3.0, 1.0]) == {0: 3.0}
    assert slow_processes([1.0]) == {} and slow_processes([0.0, 0.0]) == {}
    seconds = StepSeconds(torch.device("cpu"))
    for _ in range(2):
        seconds.start()
        time.sleep(0.02)
        seconds.stop()
        time.sleep(0.05)  # waiting for others does not count
    assert seconds.steps == 2 and 0.02 <= seconds.take() < 0.045 and seconds.steps == 0
