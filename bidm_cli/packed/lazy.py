"""Inputs of packed layers that are described rather than made, for a backend that reads them where they lie.

    layer(Lazy((h, skip)))              # as layer(torch.cat([h, skip], dim=1)), without the copy
    layer(Lazy((h,), repeat=2))         # as layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))

Only where ``backend.reads_lazily``; other backends get the tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor



class Lazy(NamedTuple):
    """Tensors [N, C_i, H, W] side by side in their channels, each pixel ``repeat`` by ``repeat`` times."""

    parts: tuple[Tensor, ...]
    repeat: int = 1

    def made(self) -> Tensor:
        """The tensor that this stands for."""
        x = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)
        return x if self.repeat == 1 else F.interpolate(x, scale_factor=float(self.repeat), mode="nearest")

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, _, height, width = self.parts[0].shape
        return n, sum(part.shape[1] for part in self.parts), self.repeat * height, self.repeat * width

    def dim(self) -> int:
        return 4

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        """Of the first part."""
        return self.parts[0].is_contiguous(memory_format=memory_format)


def made(x: Tensor | Lazy) -> Tensor:
    """A tensor, whichever came."""
    return x.made() if isinstance(x, Lazy) else x


def repeated(x: Tensor, backend: Any) -> Tensor | Lazy:
    """x at twice the size by nearest neighbour; only described where the backend reads that."""
    doubled = Lazy((x,), repeat=2)
    return doubled if backend.reads_lazily else doubled.made()
