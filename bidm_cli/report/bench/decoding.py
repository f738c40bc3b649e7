"""Timing of one picture's decoding, by a packed model's first stage against its float original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.recording.decoder import decoder_of
from bidm_cli.report.bench.step import time_in_turn, warm_up

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def decoding_seconds(
    original: DiffusionModel, packed: PackedModel, rounds: int
) -> tuple[str, dict[str, tuple[float, ...]]]:
    """(the float side's better memory format, seconds per round by format and "" for the packed side)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, *packed.sample_shape, generator=generator).to(packed.device)
    calls: dict[str, Callable[[], Any]] = {}
    for name, form in FORMATS.items():
        model = copy.copy(original)
        model.first_stage = copy.deepcopy(original.first_stage).to(memory_format=form)  # type: ignore[union-attr, call-overload]
        calls[name] = partial(model.decode, z)
    calls[""] = partial(decoder_of(packed), z)
    for call in calls.values():
        warm_up(call)
    found = time_in_turn(calls, rounds, packed.device)
    times = {name: tuple(seconds) for name, seconds in found.items()}
    best = min(FORMATS, key=lambda name: sorted(times[name])[rounds // 2])
    return best, times
