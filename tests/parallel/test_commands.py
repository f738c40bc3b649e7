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

from bidm_cli.distill.data import SyntheticData
from bidm_cli.distill.trainer import Trainer
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.read import load_packed
from bidm_cli.parallel.launch import launch
from bidm_cli.parallel.place import LOST, Place, own_place
from bidm_cli.parallel.processes import Processes
from bidm_cli.recipe import Recipe
from bidm_cli.report.drawing import draw_set
from bidm_cli.sampling.options import SamplingOptions
from tests.cli.running import DEMO
from tests.distill.conftest import make_teacher
from tests.parallel.running import ROOT, bidm_together, command, together
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


def drawing(packed: Path, out: Path, n: int = 70) -> tuple[object, ...]:
    more = ("--raw", "--npz", "--backend", "torch", "--device", "cpu", "--out")
    return ("sample", packed, "-n", n, "--steps", 2, *more, out)


def test_images_of_two_processes_are_those_of_one(packed: Path, tmp_path: Path) -> None:
    """All files byte for byte; the leftover of a killed run is removed once, not under a process's hands."""
    statuses, _, _ = bidm_together(1, tmp_path / "said", *drawing(packed, tmp_path / "one"))
    assert statuses == [0]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / ".000001.0123abcd.png").write_bytes(b"half")
    statuses, out, err = bidm_together(2, tmp_path / "said", *drawing(packed, tmp_path / "two", 40))
    assert (statuses, err, out.count("Drew 40")) == ([0, 0], "", 1)
    # A folder that grows, and has lost an image, by another number of processes.
    (tmp_path / "two" / "000003.png").unlink()
    statuses, out, err = bidm_together(3, tmp_path / "said", *drawing(packed, tmp_path / "two"))
    assert (statuses, err, out.count("Drew 31 ")) == ([0, 0, 0], "", 1)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_report_s_images_are_shared_out(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_packed(packed, backend="torch")

    def draw(processes: Processes) -> None:
        drawn = draw_set(model, packed, 40, SamplingOptions(steps=2), processes=processes)
        assert drawn.seconds is None and len(list(drawn.path.glob("0*.png"))) == 40

    together(2, draw)


@pytest.mark.slow
def test_a_report_draws_in_all_processes_and_speaks_in_one(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("report", packed, "--draw", 40, "--steps", 2, "--json", "r.json", "--processes", 2)
    assert done.returncode == 0 and done.stdout.count("FID was not asked for") == 1, done.stderr
    (drawn,) = json.loads(Path("r.json").read_text())["drawn"]
    assert len(list(Path(drawn["samples"]).glob("0*.png"))) == 40


def test_an_error_of_all_processes_is_one_line(packed: Path, tmp_path: Path) -> None:
    words = (*drawing(packed, tmp_path / "x"), "--label", "all")
    statuses, out, err = bidm_together(2, tmp_path / "said", *words)
    assert (statuses, out) == ([1, 1], "") and err == "Error: this model has no classes; leave out --label\n"
    statuses, _, err = bidm_together(2, tmp_path / "said", *words, "--no-such-option")
    assert statuses == [2, 2] and err.count("No such option") == 1


def compressing(folder: Path, *more: object) -> tuple[object, ...]:
    (folder / "small.yaml").write_text(RECIPE)
    words = ("compress", "x.pth", "--recipe", folder / "small.yaml", "--run-dir", folder / "run", "-o")
    return (*words, folder / "x.bidm", "--no-trajectory", "--device", "cpu", *more)


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Steps, by rank, at which a process kills itself."""
    deaths: dict[int, int] = {}
    step = Trainer._one_step

    def dying(self: Trainer, take: object) -> torch.Tensor:
        if deaths.get(self.processes.rank) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, take)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_one_step", dying)
    monkeypatch.setattr(SyntheticData, "PIECE", 8)
    monkeypatch.setattr("bidm_cli.checkpoints.open.load_checkpoint", lambda *names, **how: make_teacher())
    return deaths


@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_dies_ends_the_run_with_one_line_and_it_goes_on(
    tmp_path: Path, dies: dict[int, int], victim: int
) -> None:
    """Killed at step 3; continued by one process. The samples to train on are shared out."""
    dies[victim] = 3
    statuses, _, err = bidm_together(2, tmp_path / "said", *compressing(tmp_path, "--steps", 5))
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == LOST
    pieces = [file.name for file in sorted((tmp_path / "run").glob("synth*"))]
    assert pieces == [f"synthetic-{first:06d}.npy" for first in (0, 8, 16)]
    if victim:  # the first one speaks and writes
        assert len(err.splitlines()) == 1 and "process 0: another process of the run ended" in err
        assert "the state after step 3 is saved" in err and "continue with --resume" in err
        assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3
    else:  # it is for its launcher to speak
        assert err == ""
    dies.clear()
    words = compressing(tmp_path, "--steps", 5, "--resume", "--accumulate", 2)
    statuses, _, err = bidm_together(1, tmp_path / "said", *words)
    assert statuses == [0], err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 5


def test_a_dry_run_tries_its_steps_in_all_processes_at_once_and_speaks_once(
    tmp_path: Path, dies: dict[int, int]
) -> None:
    words = compressing(tmp_path, "--steps", 5, "--dry-run", "--processes", 2)
    statuses, out, err = bidm_together(2, tmp_path / "said", *words)
    assert (statuses, err, out.count("per step")) == ([0, 0], "", 1)
    assert (
        "2 processes of 2 rows" in out
        and "from steps of 2 rows that were tried, in 2 processes at once" in out
    )
    assert not (tmp_path / "run").exists() and not (tmp_path / "x.bidm").exists()


def test_other_data_on_another_machine_is_seen(tmp_path: Path, dies: dict[int, int]) -> None:
    """The second process has another recipe at the same path, as on a machine with a copy of its own."""
    words = compressing(tmp_path, "--steps", 5)
    parse = Recipe.parse.__func__  # type: ignore[attr-defined]

    def other(cls: type[Recipe], text: str, source: str = "recipe") -> Recipe:
        return parse(cls, text.replace("lr: 1.0e-3", f"lr: {1 + own_place().rank}.0e-3"), source)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Recipe, "parse", classmethod(other))
        statuses, _, err = bidm_together(2, tmp_path / "said", *words)
    assert statuses == [1, 1] and len(err.splitlines()) == 1 and "process 1 has another recipe" in err


@pytest.mark.slow
def test_whole_commands_started_by_bidm_and_by_torchrun(packed: Path, tmp_path: Path) -> None:
    done = command(*drawing(packed, tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    done = command(*drawing(packed, tmp_path / "two", 40), "--processes", 2)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("Drew 40") == 1, done.stderr
    done = command(*drawing(packed, tmp_path / "two"), torchrun=2)
    assert done.returncode == 0 and done.stdout.count("Drew 30") == 1, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    done = command(*drawing(packed, tmp_path / "x"), "--label", "all", "--processes", 2)
    assert done.returncode == 1 and done.stderr == "Error: this model has no classes; leave out --label\n"


KILLED = """
import os, signal
from bidm_cli.cli.main import main
from bidm_cli.distill.data import SyntheticData
from bidm_cli.distill.trainer import Trainer
step = Trainer._one_step
def dying(self, take):
    if self.processes.rank == 1 and self.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, take)
Trainer._one_step = dying
main()
"""


@pytest.mark.slow
def test_the_launcher_says_which_process_was_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", DEMO / "digits.pth", *compressing(tmp_path, "--data", DEMO / "digits.npz")[2:]]
    program = [sys.executable, "-c", KILLED, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it, before this program imports torch
    with pytest.raises(BidmError, match=r"process 1 of 2 was ended by SIGKILL.*continue with `resume`"):
        launch(2, program, "continue with `resume`", environment)
    assert capfd.readouterr().err == ""
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3


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
