"""Out-of-memory errors of a GPU as one line that names a batch size that fits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError

RESERVE = 0.9
"""Share of the memory to plan with: allocators leave gaps."""


@contextlib.contextmanager
def explaining_memory(model: DiffusionModel, images: int) -> Iterator[None]:
    """Turn torch's out-of-memory error in a step of ``images`` images into a BidmError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        failed = error
    else:
        return
    # Outside the handler: there the traceback would keep the tensors of the failed step alive.
    raise BidmError(_message(model, images, failed.with_traceback(None)))


def _message(model: DiffusionModel, images: int, error: torch.OutOfMemoryError) -> str:
    what = f"not enough GPU memory for {images} images at a time"
    if model.device.type != "cuda" or images == 1:
        return f"{what}; use a smaller model, or `device` cpu"
    with contextlib.suppress(torch.OutOfMemoryError):
        fitting = images_that_fit(model, images)
        return f"{what}; about {fitting} fit: `batch_size` {fitting}"
    return f"{what}, nor for one; close other programs that use the GPU, or use `device` cpu"


def images_that_fit(model: DiffusionModel, most: int) -> int:
    """Largest batch of a step, from 1 to ``most`` - 1 images, by what steps of one and two images need.

    Raises:
        torch.OutOfMemoryError: not even one.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    one, two = (_peak(model, n) for n in (1, 2))
    return fitting(one, two, int(RESERVE * free), most)


def fitting(one: int, two: int, available: int, most: int) -> int:
    """The n below ``most`` with one + (n - 1) (two - one) <= available; at least 1."""
    each = max(two - one, 1)
    return max(1, min(most - 1, 1 + (available - one) // each))


@torch.no_grad()
def _peak(model: DiffusionModel, images: int) -> int:
    """Bytes that a step of ``images`` images takes beyond what is allocated before."""
    device = model.device
    x = torch.zeros(images, *model.sample_shape, device=device)
    t = torch.zeros(images, dtype=torch.long, device=device)
    condition = model.example(images)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model.denoise(condition.join(x), t, condition.context, condition.y, {})
    return torch.cuda.max_memory_allocated(device) - before
