"""Gaussian noise that belongs to an image, whatever batch it is drawn in.

Image i of seed s reads its start noise and then one draw per step from a generator of its own, seeded by
(s, i) alone. NumPy's generators are used because torch's CPU generator keeps only 32 bits of its seed: of
50,000 images a pair would be the same once in four runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bidm_cli.errors import BidmError
from bidm_cli.transfer import to_device


class ImageNoise:
    """Noise of the images ``numbers``, each from its own stream: the start, then one draw per step.

    Raises:
        BidmError: a negative seed.
    """

    def __init__(
        self, seed: int, numbers: Sequence[int], shape: tuple[int, ...], device: str | torch.device
    ) -> None:
        if seed < 0:
            raise BidmError(f"the seed is {seed}; use 0 or more (`seed`)")
        self.shape, self.device = shape, device
        # spawn_key keeps (seed, number) apart for every pair; a plain list of both would not.
        self._streams = [
            np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=(number,))))
            for number in numbers
        ]

    def draw(self) -> Tensor:
        """Next draw of every image, [len(numbers), *shape] float32."""
        drawn = [stream.standard_normal(self.shape, dtype=np.float32) for stream in self._streams]
        noise = torch.from_numpy(np.stack(drawn))
        return to_device(noise, self.device)
