"""Reading by several threads: the same results and errors, in order, whatever was expected."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from bidm_cli.distill import image_data, image_reader
from bidm_cli.distill.compress import compress
from bidm_cli.distill.image_reader import ImageReader, default_workers
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_teacher


@pytest.fixture(params=[1, 4])
def workers(request) -> int:
    return request.param


def test_results_are_those_of_their_numbers(workers):
    def read(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    reader = ImageReader(read, workers)
    for numbers in ([5, 3, 1], [1, 7, 9], [9]):
        reader.expect(numbers)
        assert [reader.take(i) for i in (*numbers, 20)] == [i * i for i in (*numbers, 20)]


def test_each_is_read_once_and_forgotten_ones_when_taken(workers):
    found: list[int] = []
    reader = ImageReader(found.append, workers)
    reader.expect([1, 2])
    reader.expect([2, 3])
    for number in (2, 3):
        reader.take(number)
    assert found.count(2) == found.count(3) == 1
    found.clear()
    reader.take(2)
    assert found == [2]


def test_threads_read_before_it_is_taken():
    seen: list[str] = []
    done = threading.Event()

    def read(number: int) -> None:
        seen.append(threading.current_thread().name)
        done.set()

    reader = ImageReader(read, 2)
    reader.expect([0])
    assert done.wait(10) and seen[0].startswith("bidm-read")


def test_errors_are_raised_where_the_result_is_taken(workers):
    def read(number: int) -> int:
        if number == 1:
            raise ValueError("no such one")
        return number

    reader = ImageReader(read, workers)
    reader.expect([0, 1, 2])
    assert reader.take(0) == 0
    with pytest.raises(ValueError, match="no such one"):
        reader.take(1)
    assert reader.take(2) == 2


def test_workers_are_half_of_the_cores(monkeypatch):
    for cores, expected in ((1, 1), (2, 1), (8, 4), (64, 8)):
        monkeypatch.setattr(image_reader.os, "sched_getaffinity", lambda pid, cores=cores: range(cores))
        assert default_workers() == expected


def test_runs_give_the_same_bytes_with_any_number_of_workers(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(image_data, "default_workers", lambda workers=workers: workers)
        compress(make_teacher(), Recipe.parse(TINY), "x.bidm", data=images, trajectory_points=0)
        found.append((tmp_path / "x.bidm").read_bytes())
    assert found[0] == found[1]


def test_unreadable_images_are_replaced_in_the_same_order(images, monkeypatch):
    found = []
    for workers in (1, 4):
        monkeypatch.setattr(image_data, "default_workers", lambda workers=workers: workers)
        data = image_data.ImageData(make_teacher(), images)
        read = data._reader._read

        def broken(index: int, read=read):
            if index in (3, 4, 11):
                raise image_data.BidmError(f"{index} is damaged")
            return read(index)

        data._reader._read = broken
        data.expect(torch.tensor([3, 9]))
        batches = [
            data.batch(torch.tensor(order), torch.Generator())[0] for order in ([4, 3, 5], [11, 0, 19])
        ]
        found.append((torch.stack(batches), sorted(data._unreadable)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] == [3, 4, 11]
