"""Tiles of conv_bmma.cu, and the choice of one for a layer.

A block keeps ``filters`` filters in shared memory and takes 128 output pixels at a time, a box of images x
rows x columns. The best tile is estimated from published instruction rates (sm_90: 0.54 binary matrix
instructions and one warp-wide load from shared memory per clock and multiprocessor), not from measurements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

PIXELS = 128
WARPS = 8
BIT_MATRIX = 1 / 0.54
"""Clocks of one m16n8k256 instruction on one multiprocessor."""
OUTPUT = 0.25
"""Clocks for the memory traffic of one output, about 4 bytes."""
INPUT = 0.25
"""Clocks for one word of the halo: its address, and the load from the second-level cache."""
LATENCY = 1000.0
"""Clocks until a tile's first words arrive, hidden only by another block."""
LONGEST = 4095
"""Most rows or columns of input under a tile: conv_bmma.cu packs a position into one word."""
MOST_PRODUCTS = 42
"""Most products of 16 pixels of one plane x 8 filters in a warp's registers; with more they spill."""
_RESERVED = 1024


@dataclass(frozen=True)
class ConvSize:
    """Layer and output sizes that the choice of a tile depends on.

    Attributes:
        words: per pixel. kernel, stride: (vertical, horizontal).
        images, height, width, filters: of the output.
        planes: of the activations.
    """

    words: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    images: int
    height: int
    width: int
    filters: int
    planes: int = 1

    @property
    def steps(self) -> int:
        """Steps of 256 bits through a window."""
        return -(-self.words * self.kernel[0] * self.kernel[1] // 8)


@dataclass(frozen=True)
class Tile:
    """Work of a block at a time.

    Attributes:
        filter_tiles: times 8 filters per warp. warps: side by side in the filters' direction.
        images, rows, columns: the box of output pixels, at most 128.
    """

    filter_tiles: int
    warps: int
    images: int
    rows: int
    columns: int

    @property
    def filters(self) -> int:
        """Filters of a block."""
        return 8 * self.filter_tiles * self.warps

    def boxes(self, size: ConvSize) -> int:
        """Tiles that cover the output."""
        return -(-size.images // self.images) * -(-size.height // self.rows) * -(-size.width // self.columns)

    def window(self, size: ConvSize) -> tuple[int, int]:
        """Rows and columns of input under a tile."""
        rows = (self.rows - 1) * size.stride[0] + size.kernel[0]
        return rows, (self.columns - 1) * size.stride[1] + size.kernel[1]

    def halo(self, size: ConvSize) -> int:
        """Input pixels under a tile."""
        rows, columns = self.window(size)
        return self.images * rows * columns

    def fits(self, size: ConvSize, shared_memory: int) -> bool:
        """True if a block has the memory for it, and its positions fit into words."""
        return (
            size.planes * self.warps * self.filter_tiles <= MOST_PRODUCTS
            and self.shared_memory(size) <= shared_memory
            and max(self.window(size)) <= LONGEST
        )

    def shared_memory(self, size: ConvSize) -> int:
        """Bytes per block, as conv_bmma.cu lays them out."""
        pixel_stride = (size.planes * size.words + 3) // 8 * 8 + 4
        output_stride = 8 * self.filter_tiles + (0 if self.filter_tiles % 2 else 8)
        words = (
            8 * size.steps
            + WARPS * 16 * output_stride
            + self.filters * (8 * size.steps + 4)
            + self.halo(size) * (pixel_stride + 1)
        )
        return PIXELS * terms_bytes(size.planes) + 4 * words

    def blocks_together(self, size: ConvSize, shared_memory: int) -> int:
        """Blocks per multiprocessor at once: two if registers (small tiles) and shared memory allow."""
        room = 2 * (self.shared_memory(size) + _RESERVED) <= shared_memory + _RESERVED
        return 2 if size.planes * self.warps <= 2 and room else 1

    def clocks(self, size: ConvSize, multiprocessors: int, shared_memory: int) -> float:
        """Estimate of the time that the convolution takes."""
        together = self.blocks_together(size, shared_memory)
        products = size.planes * self.warps  # for each 8 filters that a warp loads
        instruction = max(BIT_MATRIX, 4 / self.filter_tiles + 2 / products)
        counting = size.planes * (PIXELS // 16 * self.filters // 8) * size.steps * instruction
        output = PIXELS * self.filters * OUTPUT
        entry = self.halo(size) * size.planes * size.words * INPUT
        if together == 2:  # the traffic of one overlaps with the counting of the other
            tile = entry + max(counting, output) + LATENCY / 2
        else:
            tile = entry + counting + output + LATENCY
        units = self.boxes(size) * -(-size.filters // self.filters)
        return -(-units // multiprocessors) * tile


def terms_bytes(planes: int) -> int:
    """Size of PixelTerms (conv.cuh)."""
    return 16 if planes == 1 else 32


@lru_cache(maxsize=1024)
def best_tile(size: ConvSize, multiprocessors: int, shared_memory: int) -> Tile | None:
    """The tile with the lowest estimate; None if none fits into shared memory."""
    fitting = [tile for tile in _candidates(size) if tile.fits(size, shared_memory)]
    if not fitting:
        return None
    return min(fitting, key=lambda t: (t.clocks(size, multiprocessors, shared_memory), t.halo(size)))


def _candidates(size: ConvSize) -> Iterator[Tile]:
    """Every shape of the warps' tiles, each with the boxes that need the fewest tiles."""
    powers = [1 << i for i in range(8)]
    boxes = [box for box in itertools.product(powers, repeat=3) if box[0] * box[1] * box[2] <= PIXELS]
    for filter_tiles, warps in ((4, 1), (7, 1), (8, 1), (4, 2), (7, 2), (8, 2), (7, 4), (8, 4)):
        tiles = [Tile(filter_tiles, warps, *box) for box in boxes]
        tiles.sort(key=lambda tile: (tile.boxes(size), tile.halo(size)))
        yield from tiles[:4]
