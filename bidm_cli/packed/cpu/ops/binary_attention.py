"""Attention with binary scores on the CPU; the formula is :mod:`bidm_cli.binary.attention`'s."""

from __future__ import annotations

import functools
import math
import threading

import torch
from torch import Tensor

from bidm_cli.packed.cpu.codegen.isa import FLOAT_TILES, FloatTile, instruction_set
from bidm_cli.packed.cpu.ops.attention import PRODUCTS
from bidm_cli.packed.cpu.ops.binary_attention_kernel import BINARY_ATTENTION_JOB
from bidm_cli.packed.cpu.runtime.args import record
from bidm_cli.packed.cpu.runtime.compile import binary_attention_launchers
from bidm_cli.packed.cpu.runtime.threads import threads_for
from bidm_cli.packed.format.bits import words_per_tap


class BinaryAttentionPlan:
    """Binary attention on one shape, as :class:`bidm_cli.packed.cpu.ops.attention.AttentionPlan`."""

    def __init__(self, tile: FloatTile, shape: tuple[int, ...], threads: int) -> None:
        images, heads, queries, keys, width, value_width = shape
        wide = tile.lanes * tile.vectors
        padded_keys, padded_values = (-(-n // wide) * wide for n in (keys, value_width))
        pairs, words, score_pitch = images * heads, words_per_tap(width), padded_keys + tile.lanes
        self.places = {
            "key_words": torch.zeros(pairs, padded_keys * words, dtype=torch.int32),
            "key_means": torch.zeros(pairs, padded_keys),
            "query_words": torch.zeros(threads, tile.rows, words, dtype=torch.int32),
            "values": torch.zeros(pairs, keys, padded_values),
            "scores": torch.empty(threads, tile.rows, score_pitch),
            "factors": torch.empty(heads),
        }
        self.threads = threads
        sizes = {
            "images": images,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "width": width,
            "value_width": value_width,
            "words": words,
            "score_pitch": score_pitch,
            "padded_keys": padded_keys,
            "padded_values": padded_values,
        }
        addresses = {name: place.data_ptr() for name, place in self.places.items()}
        self.job = record(BINARY_ATTENTION_JOB, {**sizes, **addresses})
        self.launches = binary_attention_launchers(tile)
        self.at = self.job.ctypes.data

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, factors: Tensor) -> None:
        """q [N, heads, L, d], k [N, heads, M, d], v and out [N, heads, M or L, e]; last axes contiguous.

        ``factors`` [heads] or [1] are multiplied onto the scores.
        """
        job = self.job
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
            job[name] = tensor.data_ptr()
            image, head, row, _ = tensor.stride()
            job[f"{name}_image"], job[f"{name}_head"], job[f"{name}_row"] = image, head, row
        torch.mul(factors, math.log2(math.e), out=self.places["factors"])
        for launch in self.launches:
            launch(self.at, self.threads, self)


@functools.lru_cache(maxsize=64)
def _plan(tile: FloatTile, shape: tuple[int, ...], threads: int, thread: int) -> BinaryAttentionPlan:
    return BinaryAttentionPlan(tile, shape, threads)


def binary_attention(
    q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
) -> Tensor:
    """Shapes and memory layout as :func:`bidm_cli.packed.cpu.ops.attention.attention`; score_scale [heads]."""
    q, k, v = (
        x if x.stride(-1) == 1 and x.dtype == torch.float32 else x.float().contiguous() for x in (q, k, v)
    )
    n, heads, queries, width = q.shape
    shape = (n, heads, queries, k.shape[2], width, v.shape[3])
    out = torch.empty(n, queries, heads, v.shape[3]).transpose(1, 2)
    # The values' product is most of the work.
    threads = threads_for(n * heads * queries * k.shape[2] * v.shape[3], PRODUCTS)
    plan = _plan(FLOAT_TILES[instruction_set()], shape, threads, threading.get_ident())
    factors = score_scale.abs() * (width**-0.5 if scale is None else scale)
    plan.run(q, k, v, out, factors.expand(heads))
    return out
