"""The bookkeeping of captured steps, with a recorder that runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bidm_cli.diffusion.condition import Condition
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.packed.recording.denoiser import RecordedDenoiser, denoisers_of
from bidm_cli.packed.recording.recorder import CannotRecord, Recorded
from bidm_cli.sampling.gpu_memory import explaining_memory, fitting
from bidm_cli.sampling.guidance import GuidedDenoiser


class Recorder:
    """Runs a step when it is replayed; like a GPU, into the same memory every time."""

    what = "a graph"
    runs_first = False

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recorded:
        self.recorded += 1
        run()
        output = run()

        def replay() -> None:
            output.copy_(run())

        return Recorded(replay, output)


def steps(
    model: Callable[..., Tensor], x: Tensor, times: list[int], memory: dict[str, Tensor]
) -> list[Tensor]:
    return [model(x, torch.full((len(x),), t), carried=memory) for t in times]


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(student: Callable[..., DiffusionModel]) -> DiffusionModel:
    model = student()
    model.unet.requires_grad_(False)
    return model


def test_steps_are_those_of_the_model(model: DiffusionModel) -> None:
    recorder = Recorder()
    found = steps(RecordedDenoiser(model, recorder), noise(2), [900, 880, 860, 840], {})
    for a, b in zip(found, steps(model.denoise, noise(2), [900, 880, 860, 840], {}), strict=True):
        assert torch.equal(a, b)
    assert recorder.recorded == 2  # a first step and the later ones


def test_one_recording_a_shape(model: DiffusionModel) -> None:
    recorder = Recorder()
    denoise = RecordedDenoiser(model, recorder)
    for n in (1, 3, 1, 3):
        t = torch.full((n,), 50)
        assert torch.equal(denoise(noise(n), t), model.denoise(noise(n), t))
    assert recorder.recorded == 2


def test_alternating_samplings_keep_their_own_features(model: DiffusionModel) -> None:
    """As the two passes of classifier-free guidance do."""
    denoise, memories = RecordedDenoiser(model, Recorder()), [{}, {}]
    expected_memories: list[dict[str, Tensor]] = [{}, {}]
    for step in (900, 880, 860):
        t = torch.full((2,), step)
        for i in (0, 1):
            expected = model.denoise(noise(2, i), t, carried=expected_memories[i])
            assert torch.equal(denoise(noise(2, i), t, carried=memories[i]), expected)
    for found, expected in zip(memories, expected_memories, strict=True):
        assert found.keys() == expected.keys() != set()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_sampling_after_another_starts_anew(model: DiffusionModel) -> None:
    denoise = RecordedDenoiser(model, Recorder())
    first = steps(denoise, noise(2), [900, 880], {})
    second = steps(denoise, noise(2), [900, 880], {})
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_sampling_begun_elsewhere_can_go_on(model: DiffusionModel) -> None:
    memory: dict[str, Tensor] = {}
    steps(model.denoise, noise(2), [900], memory)
    found = steps(RecordedDenoiser(model, Recorder()), noise(2), [880], memory)
    expected = steps(model.denoise, noise(2), [900, 880], {})
    assert torch.equal(found[0], expected[1])


def test_results_are_not_overwritten(model: DiffusionModel) -> None:
    denoise, t = RecordedDenoiser(model, Recorder()), torch.full((2,), 10)
    first = denoise(noise(2), t)
    kept = first.clone()
    denoise(noise(2, 1), t)
    assert torch.equal(first, kept)


def test_float_networks_are_not_recorded(model: DiffusionModel) -> None:
    assert denoisers_of(model, 2) == [model.denoise, model.denoise]


def test_features_from_elsewhere_are_taken_over(model: DiffusionModel) -> None:
    """A memory that was recorded with, then went through the model itself, then back."""
    denoise, memory = RecordedDenoiser(model, Recorder()), {}
    steps(denoise, noise(2), [900], memory)
    steps(model.denoise, noise(2), [880], memory)
    found = steps(denoise, noise(2), [860], memory)
    assert torch.equal(found[0], steps(model.denoise, noise(2), [900, 880, 860], {})[2])


def test_where_recording_fails_the_model_is_called(model: DiffusionModel) -> None:
    """At the second step, after the features were changed by the attempt; said once."""

    class Failing(Recorder):
        def __call__(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recorded:
            if self.recorded:
                run()
                raise CannotRecord("operation not permitted")
            return super().__call__(run, inputs)

    with pytest.warns(RuntimeWarning, match="operation not permitted") as said:
        found = steps(RecordedDenoiser(model, Failing()), noise(2), [900, 880, 860], {})
    expected = steps(model.denoise, noise(2), [900, 880, 860], {})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(said) == 1


def test_short_memory_is_one_clear_line(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def denoise(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")

    monkeypatch.setattr(model, "denoise", denoise)
    with pytest.raises(BidmError, match="not enough GPU memory for 2 images") as caught:
        GuidedDenoiser(model, Condition())(noise(2), 0)
    assert "\n" not in str(caught.value)


class Card:
    """A GPU's memory: a step takes 10 bytes and 2 an image more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: DiffusionModel, free: int) -> None:
        self.free, self.peak = free, 0
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        real = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **more: real(*shape, **more))
        for name, value in {
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (self.free, 10**9),
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 100 + self.peak,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(model, "denoise", self.denoise)

    def denoise(self, x: Tensor, *rest: object) -> Tensor:
        self.peak = 10 + 2 * len(x)
        if self.peak > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x


@pytest.mark.parametrize(
    ("free", "says"),
    [(50, "about 17 fit: `batch_size` 17"), (12, "nor for one"), (14, "about 1 fit: `batch_size` 1")],
)
def test_it_names_a_batch_size_that_fits(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, free: int, says: str
) -> None:
    """Nine tenths of 50 bytes are 45: 10 and 17 times 2 fit."""
    card = Card(monkeypatch, model, free)
    with pytest.raises(BidmError, match=says) as caught, explaining_memory(model, 64):
        card.denoise(noise(64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "two", "available", "most", "expected"),
    [
        (10, 12, 30, 64, 11),
        (10, 12, 1000, 64, 63),
        (10, 12, 9, 64, 1),
        (5, 5, 100, 8, 7),
        (10, 12, 10, 64, 1),
    ],
)
def test_how_many_fit(one: int, two: int, available: int, most: int, expected: int) -> None:
    assert fitting(one, two, available, most) == expected
    needed = one + (expected - 1) * (two - one)
    assert needed <= available or expected == 1
