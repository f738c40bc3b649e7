"""Fixed batches: batches of a constant size, so that no image depends on the others that are drawn.

Measured (torch 2.14, oneDNN, AVX-512, a small DDPMUNet): convolutions on a CPU give other bits for other
batch sizes, by about 1e-6, and with two threads and a batch of 5 even for other places in the batch. In a
binary network such a difference flips signs, and the image is another one. What the other images of the
batch hold never mattered.

So on a CPU the batch size follows from the size of the image alone, and image i always sits in slot
i mod size; free slots are filled up with copies. Then an image's bits depend on (seed, number): not on the
batch size, the number of images or interruptions (given the same machine, torch and number of threads). At
2,048 pixels per batch a larger one is hardly faster, and only the last one is ever partly empty.

On a GPU filling up a large batch would cost too much, and the batches have the size asked for: images agree
to rounding between batch sizes, and bit for bit when the batch size is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIXELS = 2048
LARGEST = 32


@dataclass(frozen=True)
class FixedBatch:
    """Images ``numbers`` in the ``slots`` of a batch of ``size``."""

    numbers: tuple[int, ...]
    slots: tuple[int, ...]
    size: int

    def spread(self, values: Tensor) -> Tensor:
        """[len(numbers), ...] to [size, ...]; free slots repeat the first image."""
        if self._is_full():
            return values
        source = [0] * self.size
        for position, slot in enumerate(self.slots):
            source[slot] = position
        return values[torch.tensor(source, device=values.device)]

    def collect(self, values: Tensor) -> Tensor:
        """[size, ...] back to [len(numbers), ...]."""
        if self._is_full():
            return values
        return values[torch.tensor(self.slots, device=values.device)]

    def _is_full(self) -> bool:
        """True if nothing moves, as always on a GPU, where a list of slots would have to be waited for."""
        return self.slots == tuple(range(self.size))


def fixed_batch_size(device: torch.device, sample_shape: tuple[int, int, int], batch_size: int) -> int:
    """Images per call of the network: 2,048 pixels' worth (1 to 32) on a CPU, else ``batch_size``."""
    if device.type != "cpu":
        return batch_size
    _, height, width = sample_shape
    return max(1, min(LARGEST, PIXELS // (height * width)))


def split_in_batches(first: int, n: int, size: int, padded: bool) -> list[FixedBatch]:
    """Images first .. first + n - 1 in batches that begin at multiples of ``size``.

    ``padded``: every batch keeps its full size; otherwise it is as large as what it holds.
    """
    batches = []
    for begin in range(first - first % size, first + n, size):
        numbers = tuple(range(max(begin, first), min(begin + size, first + n)))
        slots = tuple(number - begin if padded else number - numbers[0] for number in numbers)
        batches.append(FixedBatch(numbers, slots, size if padded else len(numbers)))
    return batches
