"""A file's noise schedule: its buffers, as a closed form where one reproduces them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_LONGEST = 100_000
_ZERO = 1e-12
"""Last alpha-bar where it should be 0: samplers divide by it."""


def schedule_from_buffers(
    tensors: Mapping[str, Tensor], configured: NoiseSchedule | None
) -> tuple[NoiseSchedule, str] | None:
    """(schedule, how it was found) from ``alphas_cumprod`` or ``betas`` in ``tensors``; None without them.

    The configured closed form is taken if it gives the buffer to its own rounding, else one guessed from the
    buffer's ends, else the numbers as they are.

    Raises:
        BidmError: the buffer is no noise schedule.
    """
    alphas, betas = tensors.get("alphas_cumprod"), tensors.get("betas")
    if alphas is None and betas is not None:
        alphas = torch.cumprod(1 - betas.double(), dim=0).to(betas.dtype)
    if alphas is None:
        return None
    _check(alphas)
    for schedule in _candidates(configured, len(alphas), *_ends(alphas, betas)):
        if _reproduces(schedule, alphas):
            return schedule, "from the file's buffers"
    note = "from the file's buffers, number by number"
    if configured is not None:
        note += " (the configuration says otherwise)"
    return NoiseSchedule.explicit(alphas.double().clamp_min(_ZERO)), note


def _candidates(
    configured: NoiseSchedule | None, timesteps: int, start: float, end: float
) -> Iterator[NoiseSchedule]:
    if configured is not None:
        yield configured
    for digits in range(2, 8):
        ends = (float(f"{start:.{digits}g}"), float(f"{end:.{digits}g}"))
        if 0 < ends[0] <= ends[1] < 1:
            yield NoiseSchedule.scaled_linear(timesteps, *ends)
            yield NoiseSchedule.linear(timesteps, *ends)
    yield NoiseSchedule.cosine(timesteps)
    yield NoiseSchedule.sigmoid(timesteps)


def _ends(alphas: Tensor, betas: Tensor | None) -> tuple[float, float]:
    """First and last beta; the buffer's own where there is one, since alphas have lost digits."""
    if betas is not None and betas.shape == alphas.shape:
        return float(betas[0]), float(betas[-1])
    values = alphas.double()
    previous = float(values[-2]) if len(values) > 1 else 1.0
    return 1 - float(values[0]), 1 - float(values[-1]) / previous if previous else 1.0


def _reproduces(schedule: NoiseSchedule, buffer: Tensor) -> bool:
    limits = torch.finfo(buffer.dtype)
    return schedule.timesteps == len(buffer) and torch.allclose(
        schedule.alphas_cumprod, buffer.double(), rtol=2 * limits.eps, atol=limits.tiny
    )


def _check(alphas: Tensor) -> None:
    problem = None
    if alphas.dim() != 1 or not alphas.is_floating_point() or not 2 <= len(alphas) <= _LONGEST:
        problem = f"it has the shape {list(alphas.shape)} and type {alphas.dtype}"
    elif not bool(((alphas >= 0) & (alphas <= 1)).all()) or not bool((alphas.double().diff() <= 0).all()):
        problem = "it does not fall from 1 to 0"
    if problem:
        raise BidmError(f"the file's alphas_cumprod is no noise schedule: {problem}")


def check_schedule(where: str, start: float, end: float, timesteps: int, largest_beta: float = 1.0) -> None:
    """Raise BidmError unless betas can run from ``start`` to ``end``, below ``largest_beta``.

    ``where`` is the settings' place, for the message.
    """
    if not 2 <= timesteps <= _LONGEST or not 0 < start <= end < largest_beta:
        raise BidmError(f"{where}: no noise schedule runs from {start} to {end} in {timesteps} steps")


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Alpha-bars that end at 0, almost: samplers divide by it (arXiv 2305.08891, algorithm 1).

    Their roots are shifted so that they end at 0 and scaled so that they start where they did; through betas
    and back, as diffusers does.
    """
    roots = alphas.sqrt()
    shifted = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))).square()
    betas = 1 - torch.cat([shifted[:1], shifted[1:] / shifted[:-1]])
    return (1 - betas).cumprod(0).clamp_min(_ZERO)


def has_zero_terminal_snr(schedule: NoiseSchedule) -> bool:
    """True if nothing of the image is left at the last step: alpha-bar is 0, or what samplers take for it."""
    return schedule.description["kind"] == "explicit" and float(schedule.alphas_cumprod[-1]) <= 2 * _ZERO


def explicit_betas(section: Section, name: str) -> Tensor:
    """Betas [T] that a configuration lists, float64.

    Raises:
        BidmError: no list of numbers between 0 and 1.
    """
    values = section.get(name)
    if not isinstance(values, list) or not 2 <= len(values) <= 100_000:
        raise section.wrong(name, "a list of 2 to 100000 numbers", values)
    try:
        betas = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise section.wrong(name, "a list of numbers", values) from None
    if betas.dim() != 1 or not bool(((betas > 0) & (betas < 1)).all()):
        raise section.wrong(name, "a list of numbers between 0 and 1", values)
    return betas


def one_line(schedule: NoiseSchedule) -> str:
    """A schedule in words."""
    description = schedule.description
    ends = [f"{key} {description[key]}" for key in ("start", "end") if key in description]
    return ", ".join([description["kind"], f"T={schedule.timesteps}", *ends])
