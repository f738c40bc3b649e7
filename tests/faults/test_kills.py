"""``kill -9``: a few moments of each kind of work; tests/faults/kills.py takes as many as asked for."""

from __future__ import annotations

import pytest

from tests.faults.kills import kill_repeatedly
from tests.faults.work import WORKS, WORKS_OF_TWO, prepare


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(work, whole, tmp_path):
    kill_repeatedly(work, whole, tmp_path, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS_OF_TWO, ids=lambda work: work.name)
def test_two_processes_of_which_one_or_all_are_killed_end_in_the_same_bytes(work, tmp_path):
    kill_repeatedly(work, prepare(tmp_path, [work]), tmp_path, kills=2, seed=2)
