"""``bidm`` in several processes: the same files, one message where one of them dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.parallel.launch import launch
from bidm_cli.parallel.place import Place, own_place
from tests.parallel.running import ROOT, command
from tests.report.models import packed_of, tiny

RECIPE = """
name: small
layers:
  - {role: "*", binarize: {activation_scale: none}}
tbs: {connect: "decoder[-8:]"}
train: {steps: 30, batch_size: 4, lr: 1.0e-3, warmup: 0, synthetic_images: 70, synthetic_steps: 2}
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    packed_of(tiny(), tmp_path / "m.bidm")
    return tmp_path / "m.bidm"


def test_images_of_two_processes_are_those_of_one(packed: Path, tmp_path: Path) -> None:
    """All files byte for byte; the leftover of a killed run is removed once, not under a process's hands."""
    options = ("sample", packed, "-n", 70, "--steps", 2, "--raw", "--npz", "--backend", "torch", "--out")
    done = command(*options, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / ".000001.0123abcd.png").write_bytes(b"half")
    done = command(*options, tmp_path / "two", "--processes", 2)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert done.stdout.count("Drew 70") == 1
    (tmp_path / "two" / "000003.png").unlink()
    done = command(*options, tmp_path / "two", torchrun=2)
    assert done.returncode == 0 and done.stdout.count("Drew 1 ") == 1, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_error_of_all_processes_is_one_line(packed: Path, tmp_path: Path) -> None:
    done = command("sample", packed, "--label", "all", "--out", tmp_path / "x", "--processes", 2)
    assert done.returncode == 1 and done.stderr == "Error: this model has no classes; leave out --label\n"


KILLED = """
import os, signal, sys
from pathlib import Path
from bidm_cli.recipe import Recipe
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill import trainer
from bidm_cli.distill.compress import compress
from bidm_cli.cli.main import cli, main
from bidm_cli.parallel.place import own_place
from tests.distill.conftest import make_teacher
import bidm_cli.checkpoints.open as opened
opened.load_checkpoint = lambda *names, **how: make_teacher()
step = trainer.Trainer._one_step
def dying(self, take):
    if os.environ.get("DIES") == f"{self.processes.rank} {self.step}":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, take)
trainer.Trainer._one_step = dying
main()
"""


def test_a_process_that_dies_ends_the_run_with_one_line_and_it_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed at step 3 in the second of two processes; continued by one; synthetic data shared out."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    words = ["compress", "x.pth", "--recipe", tmp_path / "small.yaml", "--run-dir", tmp_path / "run", "-o"]
    words += [tmp_path / "x.bidm", "--no-trajectory", "--device", "cpu", "--steps", 6]
    program = [sys.executable, "-c", KILLED, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with pytest.raises(BidmError, match=r"process 1 of 2 was ended by SIGKILL.*continue with `resume`"):
        launch(2, program, "continue with `resume`", {**environment, "DIES": "1 3"})
    assert time.monotonic() - began < 90
    assert capfd.readouterr().err == ""
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    pieces = {path.name for path in (tmp_path / "run").glob("synthetic-*.npy")}
    assert pieces == {"synthetic-000000.npy"}
    assert launch(1, [*program, "--resume"], "", environment) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 6 and (tmp_path / "x.bidm").is_file()


def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert own_place() == Place()
    # Kubernetes' PyTorchJob sets these two for programs that are not started by torchrun.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_place() == Place()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_place() == Place(1, 4, 1, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_place() == Place(1, 4, 1, 2)
    for name, value in (("RANK", "x"), ("RANK", "4"), ("LOCAL_RANK", "2")):
        with monkeypatch.context() as changed, pytest.raises(BidmError, match=f"{name}={value}"):
            changed.setenv(name, value)
            own_place()


@pytest.mark.parametrize(
    "codes, status",
    [((0, 0), 0), ((3, 1), 1), ((2, 2), 2)],
)
def test_the_status_is_that_of_the_process_that_failed(codes: tuple[int, ...], status: int) -> None:
    program = f"import os, sys; sys.exit({codes}[int(os.environ['RANK'])])"
    assert launch(2, [sys.executable, "-c", program], "") == status


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one fails, the second ignores it and SIGTERM."""
    monkeypatch.setattr("bidm_cli.parallel.launch.OWN_END", 0.5)
    monkeypatch.setattr("bidm_cli.parallel.launch.TERMINATED", 0.5)
    program = (
        "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60) if rank else sys.exit(1)"
    )
    began = time.monotonic()
    assert launch(2, [sys.executable, "-c", program], "") == 1
    assert time.monotonic() - began < 30


def test_sigterm_goes_to_all(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time; rank = os.environ['RANK']\n"
        f"def end(*_): open({str(tmp_path)!r} + '/' + rank, 'w'); sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "if rank == '0': time.sleep(0.5); os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert launch(2, [sys.executable, "-c", program], "") == 7
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1"}
    assert signal.getsignal(signal.SIGTERM) is before
