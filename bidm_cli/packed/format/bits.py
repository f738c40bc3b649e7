"""Layouts of signs as bits, in the file and in memory.

Bit 1 stands for +1, bit 0 for -1. In a packed file a filter is one row of bytes, the signs in (kh, kw, C)
order, little-endian within a byte, padded to a byte at the end only. One filter of C = 3, 1x2:

    sign   w[0,0,0] w[1,0,0] w[2,0,0] | w[0,0,1] w[1,0,1] w[2,0,1] |   -   -
    bit        0        1        2          3        4        5        6   7      of byte 0

In memory, and for activations, every kernel tap (or pixel) starts on a new 32-bit word whose surplus channels
are 0, so that a convolution is a sum over whole words:

    word   [tap 0: channels 0..31] [tap 0: channels 32..63] ... [tap 1: channels 0..31] ...

32 bits rather than 64 because the widths of diffusion U-Nets (224, 672, 320, ...) are multiples of 32 and
counts in 32-bit lanes turn into float32 in place. Words are int32 in torch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.networks.geometry import LayerGeometry

WORD = 32
"""Bits of a packed word."""


def words_per_tap(channels: int) -> int:
    """Words for one sign per channel."""
    return -(-channels // WORD)


def pack_bits(weight: Tensor) -> Tensor:
    """Signs of weights [O, C, kh, kw], [O, C, k] or [O, C] as the file's rows, uint8 [O, ceil(C kh kw / 8)].

    The sign of 0 is +1; NaN counts as -1.
    """
    bits = (weight >= 0).flatten(2) if weight.dim() > 2 else (weight >= 0)[:, :, None]
    return _packed(bits.transpose(1, 2).reshape(weight.shape[0], -1))


def _packed(bits: Tensor) -> Tensor:
    """0/1 or bool [..., n] as bytes, uint8 [..., ceil(n / 8)]."""
    packed = np.packbits(bits.cpu().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed).to(bits.device)


def _tap_bits(rows: Tensor, geometry: LayerGeometry) -> Tensor:
    """The file's rows as 0/1 uint8 [O, kh kw, C]."""
    bits = np.unpackbits(rows.cpu().numpy(), axis=1, count=geometry.fan_in, bitorder="little")
    shaped = bits.reshape(len(rows), geometry.taps, geometry.in_channels)
    return torch.from_numpy(shaped).to(rows.device)


def unpack_bits(rows: Tensor, geometry: LayerGeometry) -> Tensor:
    """The inverse of :func:`pack_bits`: float32 +1/-1 in the layer's own weight shape.

    [O, C, kh, kw] for a Conv2d, [O, C, k] for a Conv1d, [O, C] for a Linear.
    """
    bits = _tap_bits(rows, geometry).transpose(1, 2)
    o, c, (kh, kw) = geometry.out_channels, geometry.in_channels, geometry.kernel
    shape = {"conv2d": (o, c, kh, kw), "conv1d": (o, c, kw), "linear": (o, c)}
    # Copied into plain strides: from others torch would conclude that results should be channels-last.
    signs = torch.empty(shape[geometry.kind], device=rows.device)
    return signs.copy_(bits.reshape(signs.shape)).mul_(2).sub_(1)


def to_words(bits: Tensor) -> Tensor:
    """0/1 (or bool) values [..., C] as words, int32 [..., ceil(C / 32)]; surplus bits are 0."""
    return _packed(F.pad(bits, (0, -bits.shape[-1] % WORD))).view(torch.int32)


def from_words(words: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`to_words`: bool [..., C]."""
    bits = (words.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(-2)[..., :channels].bool()


def weight_words(rows: Tensor, geometry: LayerGeometry) -> Tensor:
    """The file's rows in the memory layout, int32 [O, kh kw, ceil(C / 32)]."""
    if geometry.in_channels % WORD == 0:
        # No tap needs padding: the bytes are the words.
        return rows.contiguous().view(torch.int32).reshape(len(rows), geometry.taps, -1)
    return to_words(_tap_bits(rows, geometry))
