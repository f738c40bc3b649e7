"""Places of recorded tensors: freed as tensors die, used again, never while somebody has them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from bidm_cli.packed.recording.arena import ALIGNMENT, SEGMENT, Arena


def floats(arena: Arena, *shape: int) -> Tensor:
    return arena.tensor(shape, torch.empty(shape, device="meta").stride(), torch.float32)


def test_tensors_have_the_layout_asked_for() -> None:
    arena = Arena()
    x = arena.tensor((2, 3, 4, 5), (60, 1, 15, 3), torch.float32)
    assert x.shape == (2, 3, 4, 5) and x.is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() % ALIGNMENT == 0
    assert arena.tensor((3,), (1,), torch.int64).dtype == torch.int64
    assert arena.tensor((0, 4), (4, 1), torch.float32).numel() == 0
    assert arena.tensor((), (), torch.float16).shape == ()


def test_a_place_is_used_again_once_its_tensor_is_dead() -> None:
    arena = Arena()
    x = floats(arena, 100)
    at, view = x.data_ptr(), x[10:].view(9, 10)
    del x
    assert floats(arena, 100).data_ptr() != at  # a view still has it
    del view
    assert floats(arena, 100).data_ptr() == at


def test_neighbours_join() -> None:
    arena = Arena()
    rows = [floats(arena, 1000) for _ in range(8)]
    first = rows[0].data_ptr()
    random.Random(0).shuffle(rows)
    while rows:
        rows.pop()
    assert floats(arena, 8000).data_ptr() == first


def test_what_is_larger_than_a_segment_gets_its_own() -> None:
    arena = Arena()
    small, large = floats(arena, 10), floats(arena, SEGMENT // 4 + 1)
    large.fill_(1.0)
    small.fill_(2.0)
    assert large.sum() == SEGMENT // 4 + 1 and arena.owns(small) and arena.owns(large)


def test_an_alias_sees_the_numbers_and_does_not_keep_the_place() -> None:
    arena = Arena()
    x = floats(arena, 4, 6)
    alias = arena.alias(x[1:, ::2])
    x.copy_(torch.arange(24.0).view(4, 6))
    assert torch.equal(alias, x[1:, ::2])
    at = x.data_ptr()
    del x
    assert floats(arena, 4, 6).data_ptr() == at
    assert not arena.owns(torch.zeros(3))


def test_an_alias_of_nothing() -> None:
    arena = Arena()
    x = floats(arena, 3, 4)
    assert arena.alias(x[:0]).shape == (0, 4) and arena.alias(floats(arena, 0, 5)).shape == (0, 5)


def test_living_tensors_never_overlap() -> None:
    """A thousand tensors of random sizes that come and go keep what was written into them."""
    arena, draw = Arena(), random.Random(1)
    alive: list[tuple[Tensor, float]] = []
    for i in range(1000):
        x = floats(arena, draw.choice((1, 7, 33, 1000, 40_000, 700_000)))
        x.fill_(float(i))
        alive.append((x, float(i)))
        while len(alive) > draw.randrange(1, 30):
            tensor, value = alive.pop(draw.randrange(len(alive)))
            assert bool((tensor == value).all())
    assert all(bool((tensor == value).all()) for tensor, value in alive)
