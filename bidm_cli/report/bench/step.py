"""One denoising step as a call, and the timing of several calls in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.packed.recording.denoiser import Denoiser, denoisers_of, recorder_for
from bidm_cli.sampling.fixed_batch import fixed_batch_size


def step_call(model: DiffusionModel, batch: int, plain: bool = False) -> Callable[[], Tensor]:
    """One denoising step as the sampler takes it: captured and in fixed batches if the model's backend works
    so, else the whole batch at once. With ``plain`` the network's modules are called, and their hooks.
    """
    if plain or recorder_for(model) is None:
        return _step_on(model, model.denoise, batch)
    (denoise,) = denoisers_of(model)
    size = min(batch, fixed_batch_size(model.device, model.sample_shape, batch))
    full, rest = _step_on(model, denoise, size), batch % size
    calls = [full] * (batch // size) + ([_step_on(model, denoise, rest)] if rest else [])
    return lambda: torch.cat([call() for call in calls])


def _step_on(model: DiffusionModel, denoise: Denoiser, batch: int) -> Callable[[], Tensor]:
    generator, condition = torch.Generator().manual_seed(0), model.example(batch)
    x = condition.join(torch.randn(batch, *model.sample_shape, generator=generator).to(model.device))
    t = torch.full((batch,), model.schedule.timesteps // 2, device=model.device)
    carried: dict[str, Tensor] = {}
    return lambda: denoise(x, t, condition.context, condition.y, carried)


def warm_up(step: Callable[[], Tensor]) -> None:
    """Call ``step`` three times: the first step of a sampling, the second, and the capture."""
    for _ in range(3):
        step()


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | None = None,
    *,
    repeats: Mapping[str, int] | None = None,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds per call, by name, one entry per round; each round measures all calls one after the other.

    ``repeats``: executions of a call per measurement, by name (default 1). ``before`` runs untimed before
    each measurement.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before(name)
            times[name].append(timed(call, 1 if repeats is None else repeats[name], device))
    return times


def timed(call: Callable[[], Any], repeats: int = 1, device: torch.device | None = None) -> float:
    """Seconds per execution of a call; waits for the GPU before and after."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
