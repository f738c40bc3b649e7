"""Work in a second thread: the same results in the same order, and the threads given back."""

from __future__ import annotations

import threading

import pytest
import torch

from bidm_cli.distill.prefetch import Prefetcher

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 4, 9])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_none_too_many(threads):
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number * number

    with Prefetcher(make, 3, 7, CPU) as results:
        assert [results.take() for _ in range(4)] == [9, 16, 25, 36]
    assert made == [3, 4, 5, 6]


def test_threads_are_shared_out_and_given_back(threads):
    inside: list[tuple[int, str]] = []

    def make(number: int) -> None:
        inside.append((torch.get_num_threads(), threading.current_thread().name))

    with Prefetcher(make, 0, 2, CPU) as results:
        results.take()
        results.take()
        rest = torch.get_num_threads()
    assert torch.get_num_threads() == threads
    expected = {1: (1, 1), 2: (2, 2), 4: (1, 3), 9: (2, 7)}[threads]
    for share, name in inside:
        assert ("bidm-prefetch" in name) == (threads >= 4)
        assert (share, rest) == expected


def test_an_error_is_raised_where_the_result_is_taken(threads):
    def make(number: int) -> int:
        if number == 1:
            raise ValueError("no second one")
        return number

    with Prefetcher(make, 0, 5, CPU) as results:
        assert results.take() == 0
        with pytest.raises(ValueError, match="no second one"):
            results.take()
    assert torch.get_num_threads() == threads


def test_leaving_early_stops_the_thread(threads):
    with pytest.raises(KeyboardInterrupt), Prefetcher(lambda number: number, 0, 100, CPU) as results:
        results.take()
        raise KeyboardInterrupt
    assert not any("bidm-prefetch" in thread.name for thread in threading.enumerate())


def test_a_gpu_needs_no_second_thread():
    with Prefetcher(lambda number: threading.current_thread().name, 0, 1, torch.device("cuda")) as results:
        assert "bidm-prefetch" not in results.take()
