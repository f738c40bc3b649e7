"""Activations to packed signs: :func:`pack`, and :func:`norm_pack` with a norm on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cupy_kernels.kernel import THREADS, Field, Kernel, Launcher

WORD = 32
_BLOCKS_A_MULTIPROCESSOR = 8
_MOST_CHUNKS = 64


@dataclass(frozen=True)
class Signs:
    """What a binary layer reads of its input.

    Attributes:
        words: int32 [..., ceil(C / 32)], bit 1 for +1, surplus bits 0.
        counts: int32 [...], bits that are 1.
        magnitudes: float32 [...], mean of |I| over channels; None where not asked for.
    """

    words: Tensor
    counts: Tensor
    magnitudes: Tensor | None

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device, magnitudes: bool) -> Signs:
        """Room for activations of ``shape`` [..., C]."""
        pixels = shape[:-1]
        return cls(
            torch.empty(*pixels, -(-shape[-1] // WORD), dtype=torch.int32, device=device),
            torch.empty(pixels, dtype=torch.int32, device=device),
            torch.empty(pixels, dtype=torch.float32, device=device) if magnitudes else None,
        )


def pack(
    launcher: Launcher,
    x: Tensor,
    thresholds: Tensor | None = None,
    *,
    magnitudes: bool = True,
    divisor: float | None = None,
) -> Signs:
    """Signs of x + tau, x contiguous [..., C] and thresholds float32 [C].

    ``divisor`` of the magnitudes defaults to C.
    """
    channels = x.shape[-1]
    signs = Signs.empty(x.shape, x.device, magnitudes)
    pixels = signs.counts.numel()
    if not pixels:
        return signs
    fields = {
        "x": x,
        "thresholds": thresholds,
        "words": signs.words,
        "counts": signs.counts,
        "magnitudes": signs.magnitudes,
        "divisor": float(divisor or channels),
        "pixels": pixels,
        "channels": channels,
        "aligned": _aligned(x),
    }
    team = _Team.of(channels, most_rounds=4)
    kernel = Kernel("pack.cu", "pack", "PackJob", x.dtype, team.macros)
    launcher.launch(kernel, (_blocks(launcher, pixels * team.lanes), 1), fields)
    return signs


@dataclass(frozen=True)
class Norm:
    """GroupNorm, then FiLM, then SiLU: v = silu(norm(x) (1 + scale) + shift).

    Attributes:
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
    """Signs of v + tau, and v itself if ``keep``. x is contiguous [N, ..., C], thresholds float32 [C]."""
    signs = Signs.empty(x.shape, x.device, magnitudes)
    kept = torch.empty_like(x) if keep else None
    outputs: dict[str, Field] = {
        "thresholds": thresholds,
        "activations": kept,
        "words": signs.words,
        "counts": signs.counts,
        "magnitudes": signs.magnitudes,
    }
    _normalize(launcher, x, norm, outputs)
    return signs, kept


def normalize(launcher: Launcher, x: Tensor, norm: Norm) -> Tensor:
    """v alone, for x contiguous [N, ..., C]."""
    out = torch.empty_like(x)
    _normalize(launcher, x, norm, {"activations": out})
    return out


def _normalize(launcher: Launcher, x: Tensor, norm: Norm, outputs: dict[str, Field]) -> None:
    images, channels = x.shape[0], x.shape[-1]
    if not x.numel():
        return
    pixels = x.numel() // (images * channels)
    chunk_pixels = _chunk(launcher, images, pixels)
    chunks = -(-pixels // chunk_pixels)
    fields = {
        **outputs,
        "x": x,
        "gamma": norm.gamma,
        "beta": norm.beta,
        "scale": norm.scale,
        "shift": norm.shift,
        "partials": torch.empty(images, chunks, norm.groups, 2, dtype=torch.float32, device=x.device),
        "divisor": float(channels),
        "epsilon": norm.epsilon,
        "pixels": pixels,
        "channels": channels,
        "groups": norm.groups,
        "chunks": chunks,
        "chunk_pixels": chunk_pixels,
        "silu": int(norm.silu),
        "aligned": _aligned(x),
    }
    team = _Team.of(channels, most_rounds=2)
    statistics = Kernel("norm_pack.cu", "group_statistics", "NormJob", x.dtype, team.macros)
    apply = Kernel("norm_pack.cu", "norm_pack", "NormJob", x.dtype, team.macros)
    launcher.launch(statistics, (chunks, images), fields, shared=8 * max(THREADS, channels))
    blocks = -(-_blocks(launcher, images * pixels * team.lanes) // images)
    launcher.launch(apply, (blocks, images), fields, shared=8 * norm.groups)


@dataclass(frozen=True)
class _Team:
    """Lanes that share a pixel, and how often each makes a byte of it; see signs.cuh."""

    lanes: int
    rounds: int

    @classmethod
    def of(cls, channels: int, most_rounds: int) -> _Team:
        """Eight lanes read 128 bytes in a row; more where a lane's registers would not hold its channels."""
        total = 4 * -(-channels // WORD)
        lanes = min(8, total)
        while lanes < 32 and -(-total // lanes) > most_rounds:
            lanes *= 2
        return cls(lanes, -(-total // lanes))

    @property
    def macros(self) -> tuple[tuple[str, int], ...]:
        return (("LANES", self.lanes), ("ROUNDS", self.rounds))


def _aligned(x: Tensor) -> int:
    return int(x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0)


def _blocks(launcher: Launcher, threads: int) -> int:
    """Enough blocks for all, but no more than the device runs at once: the rest is a loop in the kernel."""
    return min(-(-threads // THREADS), _BLOCKS_A_MULTIPROCESSOR * launcher.multiprocessors)


def _chunk(launcher: Launcher, images: int, pixels: int) -> int:
    """Pixels whose statistics one block takes: small enough to keep the device busy."""
    wanted = max(1, 4 * launcher.multiprocessors // images)
    return max(8, -(-pixels // min(wanted, _MOST_CHUNKS)))
