"""States of a run: two are kept, a damaged one is passed over, and nothing is lost where the disk is full."""

from __future__ import annotations

import pytest
import torch

from bidm_cli.distill import trainer as trainer_module
from bidm_cli.distill.state_files import BEFORE, NEWEST, StateFiles
from bidm_cli.errors import BidmError
from bidm_cli.files import remove_leftovers, write_atomically
from bidm_cli.progress import Reporter
from tests.distill.conftest import images  # noqa: F401
from tests.distill.test_trainer import make_trainer, weights
from tests.faults.conftest import files_up_to

CPU = torch.device("cpu")


def state(step: int) -> dict:
    return {
        "step": step,
        "recipe": {},
        "seed": 0,
        "rows": [],
        "sums": [],
        "values": torch.full((3000,), step),
    }


@pytest.fixture
def states(tmp_path):
    said: list[str] = []
    states = StateFiles(tmp_path, said.append)
    states.said = said
    return states


def test_the_two_newest_are_kept(states, tmp_path):
    for step in (1, 2, 3):
        states.save(state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEFORE, NEWEST]
    assert states.load(CPU)["step"] == 3 and torch.load(states.before)["step"] == 2
    assert states.said == []


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """One bit, in the values of a tensor: torch.load does not notice."""
    place = content.index(torch.full((3000,), 3).numpy().tobytes()) + 7000
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda content: b"", lambda content: b"\0" * len(content)])
def test_a_damaged_newest_state_falls_back_to_the_one_before(damage, states):
    for step in (1, 2, 3):
        states.save(state(step))
    states.newest.write_bytes(damage(states.newest.read_bytes()))
    assert states.load(CPU)["step"] == 2
    (line,) = states.said
    assert f"{NEWEST} cannot be read" in line and "the state before it is taken, after step 2" in line
    states.save(state(4))
    assert torch.load(states.before)["step"] == 2, "the damaged one is not kept as the one before"


def test_the_state_of_something_else_and_a_missing_newest_one_fall_back_too(states):
    states.save(state(1))
    states.save(state(2))
    torch.save({"weights": torch.zeros(3)}, states.newest)
    assert states.load(CPU)["step"] == 1
    states.save(state(2))
    states.newest.unlink()
    assert states.load(CPU)["step"] == 1
    assert "missing" in states.said[1]


def test_two_damaged_states_are_one_error_that_names_both(states):
    for path in (states.newest, states.before):
        path.write_bytes(b"no state")
    with pytest.raises(BidmError, match=rf"{NEWEST} cannot be read.*{BEFORE} cannot be read.*remove"):
        states.load(CPU)


def test_no_state_at_all_is_none(states):
    assert states.load(CPU) is None and states.said == []


def test_without_hard_links_the_two_newest_are_kept_as_well(states, monkeypatch):
    def no_link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_link)
    for step in (1, 2, 3):
        states.save(state(step))
    assert states.load(CPU)["step"] == 3 and torch.load(states.before)["step"] == 2


def test_a_disk_that_is_full_at_any_byte_leaves_the_newest_state(states, tmp_path):
    states.save(state(1))
    size = states.newest.stat().st_size
    for limit in range(0, size, size // 20):
        with files_up_to(limit), pytest.raises(BidmError, match=f"cannot write .*{NEWEST}"):
            states.save(state(2))
        assert states.load(CPU)["step"] == 1 and [path.name for path in tmp_path.iterdir()] == [NEWEST]


def test_where_a_third_state_has_no_room_the_older_one_goes_which_is_said(small_disk):
    said: list[str] = []
    states = StateFiles(small_disk(1 << 20), said.append)
    states.save(state(1))
    states.save(state(2))
    states = StateFiles(small_disk(int(2.5 * states.newest.stat().st_size)), said.append)
    states.save(state(3))
    assert states.load(CPU)["step"] == 3 and f"{BEFORE} is removed to make room" in said[0]


def test_a_run_goes_on_from_the_state_before_to_the_same_bits(images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_SECONDS", 0.0)
    whole = make_trainer(images, tmp_path)
    whole.train()
    whole.checkpoint.write_bytes(cut(whole.checkpoint.read_bytes()))
    said: list[str] = []
    again = make_trainer(images, tmp_path, reporter=Reporter(say=said.append))
    assert again.resume() and again.step in (3, 4) and "is taken" in said[0]
    again.train()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name


def test_a_run_whose_state_cannot_be_written_says_how_to_go_on(images, tmp_path):  # noqa: F811
    trainer = make_trainer(images, tmp_path)
    with files_up_to(20_000), pytest.raises(BidmError, match=r"checkpoint\.pt.*free some space.*`resume`"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*.pt")] == []


def test_temporaries_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    with pytest.raises(KeyError), write_atomically(tmp_path / "checkpoint.pt") as temporary:
        kept = tmp_path / temporary.name
        raise KeyError
    for name in (kept.name, ".lock", ".hidden.pt", ".a.1234567.pt", "b.12345678.pt"):
        (tmp_path / name).touch()
    (tmp_path / ".c.12345678.pt").mkdir()
    remove_leftovers(tmp_path)
    assert kept.name not in {path.name for path in tmp_path.iterdir()} and len(list(tmp_path.iterdir())) == 5
