"""Activations to packed signs: :func:`pack`, and :func:`norm_pack` with a norm on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cupy_kernels.kernel import THREADS, Field, Kernel, Launcher

WORD = 32
_BLOCKS_PER_MULTIPROCESSOR = 8
_MOST_CHUNKS = 64


@dataclass(frozen=True)
class Signs:
    """Packed input of a binary layer; its attributes are fields of the kernels' argument structs.

    Attributes:
        words: int32 [..., planes, ceil(C / 32)], bit 1 for +1, surplus bits 0.
        counts: int32 [..., planes], bits that are 1.
        magnitudes: float32 [...], mean of |I| over channels; None where not asked for.
    """

    words: Tensor
    counts: Tensor
    magnitudes: Tensor | None

    @classmethod
    def empty(cls, shape: torch.Size, planes: int, device: torch.device, magnitudes: bool) -> Signs:
        """Room for activations of ``shape`` [..., C]."""
        pixels = shape[:-1]
        return cls(
            torch.empty(*pixels, planes, -(-shape[-1] // WORD), dtype=torch.int32, device=device),
            torch.empty(*pixels, planes, dtype=torch.int32, device=device),
            torch.empty(pixels, dtype=torch.float32, device=device) if magnitudes else None,
        )


def pack(
    launcher: Launcher,
    x: Tensor,
    thresholds: Tensor | None = None,
    *,
    magnitudes: bool = True,
) -> Signs:
    """Signs of x + tau and of what they leave over, x contiguous [..., C].

    ``thresholds``: float32 [C], or [planes, C], contiguous: tau, then delta of each further plane.
    """
    channels, planes = x.shape[-1], _planes(thresholds)
    signs = Signs.empty(x.shape, planes, x.device, magnitudes)
    pixels = signs.counts.numel() // planes
    if not pixels:
        return signs
    fields = {
        **vars(signs),
        "x": x,
        "thresholds": thresholds,
        "divisor": float(channels),
        "pixels": pixels,
        "channels": channels,
        "aligned": _aligned(x),
    }
    lanes, macros = _lanes(channels, most_rounds=4)
    kernel = Kernel("pack.cu", "pack", "PackArgs", x.dtype, (*macros, ("PLANES", planes)))
    launcher.launch(kernel, (_blocks(launcher, pixels * lanes), 1), fields, _offset_bytes(planes, macros))
    return signs


@dataclass(frozen=True)
class Norm:
    """GroupNorm, then FiLM, then SiLU: v = silu(norm(x) (1 + scale) + shift).

    Attributes, fields of NormArgs:
        groups, epsilon: of the norm. gamma, beta: float32 [C], or None for 1 and 0.
        scale, shift: [N, C] of the activations' type, both or neither. silu: whether SiLU follows.
    """

    groups: int
    epsilon: float
    gamma: Tensor | None = None
    beta: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    silu: bool = False


def norm_pack(
    launcher: Launcher,
    x: Tensor,
    norm: Norm,
    thresholds: Tensor | None = None,
    *,
    magnitudes: bool = True,
    keep: bool = False,
) -> tuple[Signs, Tensor | None]:
    """Signs of v, as :func:`pack` makes them of x, and v itself if ``keep``. x is contiguous [N, ..., C]."""
    planes = _planes(thresholds)
    signs = Signs.empty(x.shape, planes, x.device, magnitudes)
    kept = torch.empty_like(x) if keep else None
    outputs = {**vars(signs), "thresholds": thresholds, "activations": kept}
    _normalize(launcher, x, norm, outputs, planes)
    return signs, kept


def normalize(launcher: Launcher, x: Tensor, norm: Norm) -> Tensor:
    """v alone, for x contiguous [N, ..., C]."""
    out = torch.empty_like(x)
    _normalize(launcher, x, norm, {"activations": out})
    return out


def _normalize(launcher: Launcher, x: Tensor, norm: Norm, outputs: dict[str, Field], planes: int = 1) -> None:
    images, channels = x.shape[0], x.shape[-1]
    if not x.numel():
        return
    pixels = x.numel() // (images * channels)
    chunk_pixels = _chunk(launcher, images, pixels)
    chunks = -(-pixels // chunk_pixels)
    fields = {
        **outputs,
        **vars(norm),
        "x": x,
        "partials": torch.empty(images, chunks, norm.groups, 2, dtype=torch.float32, device=x.device),
        "divisor": float(channels),
        "pixels": pixels,
        "channels": channels,
        "chunks": chunks,
        "chunk_pixels": chunk_pixels,
        "aligned": _aligned(x),
    }
    lanes, macros = _lanes(channels, most_rounds=2)
    statistics = Kernel("norm_pack.cu", "group_statistics", "NormArgs", x.dtype, (*macros, ("PLANES", 1)))
    apply = Kernel("norm_pack.cu", "norm_pack", "NormArgs", x.dtype, (*macros, ("PLANES", planes)))
    launcher.launch(statistics, (chunks, images), fields, shared=8 * max(THREADS, channels))
    blocks = -(-_blocks(launcher, images * pixels * lanes) // images)
    shared = 8 * norm.groups + _offset_bytes(planes, macros)
    launcher.launch(apply, (blocks, images), fields, shared)


def _planes(thresholds: Tensor | None) -> int:
    return 1 if thresholds is None or thresholds.dim() == 1 else len(thresholds)


def _offset_bytes(planes: int, macros: tuple[tuple[str, int], ...]) -> int:
    """Shared memory for OFFSETS floats; see signs.cuh."""
    return 4 * (planes - 1) * 8 * math.prod(value for _, value in macros)


def _lanes(channels: int, most_rounds: int) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Lanes of one pixel, and the macros for them and for the bytes that each makes; see signs.cuh.

    Eight lanes read 128 bytes in a row; more where a lane's registers would not hold its channels.
    """
    total = 4 * -(-channels // WORD)
    lanes = min(8, total)
    while lanes < 32 and -(-total // lanes) > most_rounds:
        lanes *= 2
    return lanes, (("LANES", lanes), ("ROUNDS", -(-total // lanes)))


def _aligned(x: Tensor) -> int:
    return int(x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0)


def _blocks(launcher: Launcher, threads: int) -> int:
    """Enough blocks for all, but no more than the device runs at once: the rest is a loop in the kernel."""
    return min(-(-threads // THREADS), _BLOCKS_PER_MULTIPROCESSOR * launcher.multiprocessors)


def _chunk(launcher: Launcher, images: int, pixels: int) -> int:
    """Pixels whose statistics one block takes: small enough to keep the device busy."""
    wanted = max(1, 4 * launcher.multiprocessors // images)
    return max(8, -(-pixels // min(wanted, _MOST_CHUNKS)))
