"""Steps captured for the CPU: the same bits as without, for every family, and no Python in between."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.packed.cpu.runtime.workspaces import Workspaces
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.recording import denoiser as denoiser_module
from bidm_cli.packed.recording.cpu_graph import CpuRecorder
from bidm_cli.packed.recording.denoiser import RecordedDenoiser, denoisers_of
from bidm_cli.sampling.sample import sample
from tests.packed.recording.networks import CLASSES, LDM, NETWORKS, packed

pytest.importorskip("numba")


@pytest.fixture(params=[1, 2, 4], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def classes(tmp_path: Path) -> PackedModel:
    """For 1x8x8, with labels and connections."""
    return packed(tmp_path, "ldm_unet", LDM, (1, 8, 8), backend="numba", **CLASSES)


def unrecorded(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(denoiser_module, "recorder_for", lambda model: None)
        return draw()


def recordings(model: PackedModel) -> list[denoiser_module.Recorded]:
    return [r for d in model.recorded for shape in d._shapes.values() for r in shape.recordings.values()]


CASES = [(kind, "bidm") for kind in NETWORKS]
CASES += [("ldm_unet", "w1a1-attention"), ("dit", "w1a1-attention"), ("ddpm_unet", "reference")]
CASES += [("ldm_unet", "w1a2"), ("uvit", "w1a2"), ("diffusers_unet", "mixed planes")]


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_every_network_replays_to_the_same_bits(
    kind: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three samplings of four steps: the first runs and records, the last replays all."""
    arguments, shape, more = NETWORKS[kind]
    model = packed(tmp_path, kind, arguments, shape, backend="numba", recipe=recipe, **more)
    labels = None if model.num_classes is None else 1

    def draw(seed: int) -> Tensor:
        return sample(model, n=1, steps=4, labels=labels, seed=seed)

    expected = [unrecorded(monkeypatch, lambda seed=seed: draw(seed)) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [draw(seed) for seed in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[1])
    # Without connections a first step is like any other.
    assert len(recordings(model)) == (1 if model.connections is None else 2)


@pytest.mark.parametrize("options", [{"guidance": 2.0, "eta": 1.0}, {"sampler": "dpm++"}], ids=str)
def test_samplers_replay(
    classes: PackedModel, threads: int, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def draw() -> Tensor:
        return sample(classes, n=3, steps=6, labels=[0, 1, 2], seed=3, **options)

    expected = unrecorded(monkeypatch, draw)
    assert all(torch.equal(draw(), expected) for _ in range(2))


def test_inference_mode_makes_no_difference(classes: PackedModel) -> None:
    """Begun inside, gone on with outside, and the other way round."""
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([400]), torch.tensor([1])
    (denoise,) = denoisers_of(classes)
    for modes in ((True, False), (False, True)):
        for _ in range(3):
            memory: dict[str, Tensor] = {}
            own: dict[str, Tensor] = {}
            for mode in modes * 2:
                with torch.inference_mode(mode), torch.no_grad():
                    expected = classes.denoise(x, t, None, y, own)
                    assert torch.equal(denoise(x, t, None, y, memory), expected)


def test_the_network_is_called_twice_for_each_recording(classes: PackedModel) -> None:
    """Once before, and once while it is recorded."""
    calls: list[int] = []
    classes.unet.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        sample(classes, n=1, steps=8, labels=0)
    assert len(calls) == 4


def test_hundreds_of_replays_agree(classes: PackedModel) -> None:
    """With more threads than cores, so that threads come late to items and are held up in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        (denoise,) = denoisers_of(classes)
        x, t, y = torch.randn(2, 1, 8, 8), torch.full((2,), 400), torch.tensor([1, 2])
        expected = classes.denoise(x, t, None, y)
        assert all(torch.equal(denoise(x, t, None, y), expected) for _ in range(500))
    finally:
        torch.set_num_threads(before)


def test_another_number_of_threads_records_anew(classes: PackedModel) -> None:
    (denoise,) = denoisers_of(classes)
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([400]), torch.tensor([1])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 1, 3):
            torch.set_num_threads(threads)
            expected = classes.denoise(x, t, None, y)
            assert all(torch.equal(denoise(x, t, None, y), expected) for _ in range(3))
    finally:
        torch.set_num_threads(before)
    assert len(recordings(classes)) == 2


def test_a_step_that_reads_numbers_is_said_and_run_without(
    classes: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a sampling: features of the steps before are kept."""
    expected = unrecorded(monkeypatch, lambda: sample(classes, n=1, steps=6, labels=0))
    kind = type(classes.unet.connections)
    interpolate = kind.interpolate

    def reading(connections: Any, new: Tensor, *others: Tensor) -> Tensor:
        float(new.sum())
        return interpolate(connections, new, *others)

    monkeypatch.setattr(kind, "interpolate", reading)
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CPU graph") as said:
        found = sample(classes, n=1, steps=6, labels=0)
    assert torch.equal(found, expected) and len(said) == 1


class Numbers:
    """A function of one tensor, recorded; what it gives for others."""

    def __init__(self, function: Callable[[Tensor], Tensor], *shape: int) -> None:
        self.x = torch.randn(shape)
        self.recorded = CpuRecorder()(lambda: function(self.x), [self.x])

    def __call__(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        assert self.recorded.replay is not None
        self.recorded.replay()
        return self.recorded.output.clone()


def test_a_replay_keeps_the_memory_it_works_in(classes: PackedModel) -> None:
    """Whatever else dies: recorder, output, inputs."""
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1])
    classes.denoise(x, t, None, y)
    step = functools.partial(classes.denoise, x, t, None, y)
    replay = CpuRecorder()(step, [x, t, y]).replay
    del x, t, y, step
    assert replay is not None
    others = []
    for _ in range(20):
        others.append(torch.full((1 << 18,), 7.0))
        replay()
    assert all(bool((other == 7.0).all()) for other in others)


def written_over(x: Tensor) -> Tensor:
    parts = torch.zeros(3, 4)
    parts[0] = x
    parts.add_(x)
    return parts * 2


def frequencies(x: Tensor) -> Tensor:
    return x[:, None] * torch.exp(torch.arange(8) * -0.3)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "views": (lambda x: x.transpose(0, 1).reshape(2, 6).unflatten(1, (3, 2))[:, 1] + 1, (4, 3)),
    "channels last": (lambda x: F.silu(x.to(memory_format=torch.channels_last)) * 2, (2, 3, 4, 4)),
    "zeros that are written over": (written_over, (4,)),
    "constants": (frequencies, (5,)),
    "the same twice": (lambda x: F.silu(x) + F.silu(x) * F.silu(x[:2]).sum(), (4,)),
    "the same, but for what is between": (lambda x: F.silu(x) + F.silu(x.mul_(2.0)), (4,)),
    "several results": (lambda x: sum(part * i for i, part in enumerate(x.topk(2).values.unbind())), (6,)),
    "an index": (lambda x: torch.arange(10.0)[(x.abs() * 3).long().clamp(0, 9)], (4,)),
    "nothing": (lambda x: torch.cat([x[:0] * 2, x[:0], x]) + 1, (4,)),
    "an output": (lambda x: torch.add(x, 1.0, out=torch.empty(4)), (4,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_torch_computes_is_computed_again(name: str) -> None:
    function, shape = FUNCTIONS[name]
    numbers = Numbers(function, *shape)
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(numbers(x), function(x.clone()))


def test_random_numbers_are_drawn_anew() -> None:
    numbers = Numbers(lambda x: x + torch.randn(4), 4)
    assert not torch.equal(numbers(torch.zeros(4)), numbers(torch.zeros(4)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * float(x.sum()), "depends on a tensor's values"),
        (lambda x: x[x > 0].sum(), "depends on a tensor's values"),
        (lambda x: torch.arange(4.0).add_(x), "changes a constant"),
    ],
)
def test_what_cannot_be_repeated_is_named(function: Callable[[Tensor], Tensor], reason: str) -> None:
    x = torch.randn(4)
    recorded = CpuRecorder()(lambda: function(x), [x])
    assert recorded.replay is None and reason in recorded.problem
    assert torch.equal(recorded.output, function(x))


def test_recordings_share_their_memory(classes: PackedModel) -> None:
    """Of several batch sizes and both passes of guidance: the arena grows with the largest alone."""
    recorder = CpuRecorder()
    denoiser = RecordedDenoiser(classes, recorder)

    def run(n: int) -> int:
        x, t, y = torch.randn(n, 1, 8, 8), torch.full((n,), 400), torch.zeros(n, dtype=torch.long)
        for _ in range(3):
            denoiser(x, t, None, y)
        arena = recorder._own.arena
        return sum(len(s) for _, s in arena._segments) - sum(size for _, size in arena._free)

    kept = [run(n) for n in (4, 3, 2, 1)]
    # What stays taken is small: outputs, and what is not computed twice.
    assert kept[-1] < 1 << 17


@pytest.mark.parametrize("take", ["get", "numbers", "zeros"])
def test_workspaces_keep_their_numbers_when_earlier_captures_are_replayed(take: str) -> None:
    """A capture takes memory that an earlier one has given back, and replays write there."""
    recorder, x, workspaces = CpuRecorder(), torch.ones(64), Workspaces()

    def workspace() -> Tensor:
        if take == "numbers":
            return workspaces.numbers("one", 64)
        return workspaces.zeros(64) if take == "zeros" else workspaces.get("one", lambda: torch.zeros(64))

    earlier = recorder(lambda: (x * 2) * 3, [x])
    later = recorder(lambda: x + workspace(), [x])
    assert earlier.replay is not None and later.replay is not None
    earlier.replay()
    assert not workspace().any()
    later.replay()
    assert torch.equal(later.output, x) and torch.equal(earlier.output, 6 * x)
