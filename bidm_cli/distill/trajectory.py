"""Trajectory error: distance of the student's output from the teacher's along sampling trajectories.

The training loss flatters: its inputs are noised by hand and, with connections, can leak the answer. Here the
teacher samples, and at every point it visits the student is asked, its features carried from step to step as
in its own sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import CarriedFeatures, DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter
from bidm_cli.sampling.noise import ImageNoise
from bidm_cli.sampling.prediction import Clipping, Prediction, converted, estimate
from bidm_cli.sampling.samplers.ddim import DDIM
from bidm_cli.sampling.timesteps import sampling_steps

TRAJECTORY_POINTS = 20
"""Points of the schedule at which ``compress`` compares the two networks."""


def trajectory_images(model: DiffusionModel) -> int:
    """Number of trajectories by default: 64 for small images, at least 2 for large ones."""
    _, height, width = model.sample_shape
    return max(2, min(64, 4096 // (height * width)))


@torch.no_grad()
def trajectory_error(
    teacher: DiffusionModel,
    student: DiffusionModel,
    n: int | None = None,
    steps: int = TRAJECTORY_POINTS,
    seed: int = 0,
    conditions: ConditionSet = ConditionSet(),
    reporter: Reporter = Reporter(),
) -> dict[str, Any]:
    """Mean squared error of the student's output to the teacher's along the teacher's DDIM trajectories.

    Both in terms of what the teacher predicts.
    Images are 0 .. n-1 of ``seed``, as in :func:`bidm_cli.sampling.sample.sample`; eta is 0; classes, where
    there are any, and the rows of ``conditions`` follow each other. Timesteps and clipping are the teacher's.

    Returns:
        JSON: ``mean`` over images, elements and steps; ``relative``: the same over the teacher's mean square;
        ``per_step`` (noisiest first); ``timesteps``; ``n``, ``steps``, ``seed``.

    Raises:
        BidmError: the two models do not denoise the same shape, or ``conditions`` are missing or do not fit.
    """
    if teacher.sample_shape != student.sample_shape:
        raise BidmError(
            f"the teacher denoises {list(teacher.sample_shape)}, the student {list(student.sample_shape)}; "
            "give the checkpoint it was made from"
        )
    n = trajectory_images(teacher) if n is None else n
    device = student.device
    x = ImageNoise(seed, tuple(range(n)), teacher.sample_shape, teacher.device).draw()
    labels = None if teacher.num_classes is None else torch.arange(n) % teacher.num_classes
    others = conditions.take(range(n))
    condition, own = teacher.make_condition(labels, others), student.make_condition(labels, others)
    path = DDIM(sampling_steps(teacher.schedule, teacher.convention, steps))
    carried: CarriedFeatures = {}
    limits = Clipping.of(teacher.convention)
    errors, power = [], 0.0
    for index, step in enumerate(path.steps):
        t = torch.full((n,), step.t, device=teacher.device)
        target = teacher.denoise(condition.join(x), t, condition.context, condition.y)
        output = student.denoise(own.join(x.to(device)), t.to(device), own.context, own.y, carried)
        output = _in_terms_of(teacher, student.prediction, output.to(x.device), x, step.alpha_bar)
        errors.append((output - target).square().mean().item())
        power += target.square().mean().item()
        seen = estimate(teacher.prediction, x, target, step.alpha_bar, teacher.convention.clip, limits)
        x = path.advance(index, x, seen, lambda: torch.empty(0))
        reporter.advance(None)
    return {
        "mean": sum(errors) / len(errors),
        "relative": sum(errors) / power if power else None,
        "per_step": errors,
        "timesteps": [step.t for step in path.steps],
        "n": n,
        "steps": len(errors),
        "seed": seed,
    }


def _in_terms_of(
    teacher: DiffusionModel, prediction: Prediction, output: Tensor, x: Tensor, alpha_bar: float
) -> Tensor:
    """A student's output [N, C or 2C, H, W] as the teacher would have said it."""
    channels = x.shape[1]
    own = converted(output[:, :channels], x, alpha_bar, prediction, teacher.prediction)
    return torch.cat([own, output[:, channels:]], dim=1)
