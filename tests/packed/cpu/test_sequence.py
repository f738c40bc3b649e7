"""Kernel sequences: in order, each kernel with its own number of threads, and none lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bidm_cli.networks.fusion import Fused, Prologue
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.cpu.ops.blend import blend
from bidm_cli.packed.cpu.runtime.sequence import KernelSequence, LaunchQueue
from bidm_cli.packed.cpu.runtime.threads import HOOKS, Launched, Queued, capturing
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import close, layer_of

pytest.importorskip("numba")


class Halvings:
    """Launches that halve ``values`` ten times, each from what the one before left there."""

    def __init__(self, values: Tensor) -> None:
        self.zeros, self.half = torch.zeros_like(values), torch.full((1,), 0.5)
        self.launches: list[Launched] = []
        with capturing(self.launches.append):
            for _ in range(10):
                blend(self.zeros, values, self.half)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_items_run_in_order_again_and_again(threads: int) -> None:
    """A power of two for every item and every run: one lost or doubled, or two at once, would show."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.ones(1, 300_007)
        halvings = Halvings(values)
        sequence = KernelSequence(halvings.launches)
        for run in range(1, 11):
            sequence.run()
            assert bool((values == 0.5 ** (10 + 10 * run)).all())
    finally:
        torch.set_num_threads(before)


def test_an_item_lets_in_no_more_threads_than_it_was_captured_with() -> None:
    """Its workspaces are made for so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        values = torch.ones(1, 1 << 18)
        halvings = Halvings(values)
        launches = halvings.launches
        alone = [launched._replace(threads=1) if i % 2 else launched for i, launched in enumerate(launches)]
        sequence = KernelSequence(alone)
        for _ in range(20):
            values.fill_(1.0)
            sequence.run()
            workers = sequence._headers[1::2, 1]
            assert bool((workers <= 1).all()) and bool((values == 0.5**10).all())
    finally:
        torch.set_num_threads(before)


def test_queued_launches_wait_until_they_are_asked_for() -> None:
    values, zeros, half = torch.ones(1, 1000), torch.zeros(1, 1000), torch.full((1,), 0.5)
    with LaunchQueue() as queue:
        once = blend(zeros, values, half)
        queue.flush()
        assert bool((once == 0.5).all())
        results = [once]
        for _ in range(20):
            results.append(blend(zeros, results[-1], half))
    assert bool((results[-1] == 0.5**21).all())


def test_an_error_leaves_nothing_behind() -> None:
    """Neither launches nor the habit of waiting."""
    values, zeros, half = torch.ones(1, 100), torch.zeros(1, 100), torch.full((1,), 0.5)
    with pytest.raises(ZeroDivisionError), LaunchQueue():
        blend(zeros, values, half)
        _ = 1 / 0
    assert bool((blend(zeros, values, half) == 0.5).all())


def test_threads_have_queues_of_their_own() -> None:
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        zeros, half = torch.zeros(1, 5000), torch.full((1,), 0.5)
        for _ in range(50):
            with LaunchQueue():
                value = torch.full((1, 5000), float(i))
                results[i] = blend(zeros, value, half)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bool((results[i] == i / 2).all()) for i in range(4))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(64, 96, 3, padding=1),
    "a shortcut that torch works out": lambda: nn.Conv2d(40, 24, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(64, 64, 3, 2, padding=1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("normed", [False, True])
def test_a_layer_is_the_same_in_one_go_and_one_by_one(
    name: str, normed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(LAYERS[name](), BinarySpec())
    channels = layer.geometry.in_channels
    fused = Fused(Prologue(nn.GroupNorm(8, channels), silu=True) if normed else None)
    x = torch.randn(2, channels, 9, 7).contiguous(memory_format=torch.channels_last)
    together = layer(x, fused)
    launches: list[Launched] = []
    with capturing(launches.append):
        one_by_one = layer(x, fused)
    assert torch.equal(together, one_by_one) and len(launches) == 2 + normed
    queue: list[Queued] = []
    HOOKS.queue = queue
    try:
        blend(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1))
    finally:
        HOOKS.queue = None
    assert len(queue) == 1, "queued, and never run"


@pytest.mark.parametrize("shape", [(1, 5), (3, 64, 6, 5), (2, 24, 3, 3), (2, 7, 33)], ids=str)
def test_blending_is_the_reference(shape: tuple[int, ...]) -> None:
    new, old, betas = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
    expected = TorchBackend().blend(new, old, betas)
    close(blend(new, old, betas), expected)
    if len(shape) == 4:
        last = [x.contiguous(memory_format=torch.channels_last) for x in (new, old)]
        found = blend(*last, betas)
        close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)
        close(blend(new, last[1], betas), expected)
    # A column of a table, as connections have their betas in.
    table = torch.rand(shape[0], 3)
    close(blend(new, old, table[:, 1]), TorchBackend().blend(new, old, table[:, 1]))


def test_betas_in_half_precision() -> None:
    new, old, betas = torch.randn(2, 40), torch.randn(2, 40), torch.tensor([0.25, 0.5])
    assert torch.equal(blend(new, old, betas.half()), blend(new, old, betas))


def test_blending_of_what_has_gaps() -> None:
    new, old = torch.randn(2, 8, 10)[:, :, ::2], torch.randn(2, 8, 10)[:, :, ::2]
    betas = torch.tensor([0.25, 0.5])
    close(blend(new, old, betas), TorchBackend().blend(new, old, betas))


def test_while_launches_are_captured_the_old_features_make_room() -> None:
    new, old, betas = torch.randn(1, 40), torch.randn(1, 40), torch.tensor([0.3])
    expected = blend(new, old, betas)
    with capturing(lambda launched: None):
        found = blend(new, old, betas)
    assert found is old and torch.equal(found, expected)
