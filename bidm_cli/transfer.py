"""Copies from main memory to a GPU that the CPU does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``, in ``dtype`` if that is given.

    From pinned memory: an ordinary copy to a GPU waits until all that is queued there is done.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype or tensor.dtype)
