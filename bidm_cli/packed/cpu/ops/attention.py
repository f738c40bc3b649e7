"""Attention in floats on the CPU: softmax(q k^T scale) v."""

from __future__ import annotations

import functools
import math
import threading

import torch
from torch import Tensor

from bidm_cli.packed.cpu.codegen.isa import FLOAT_TILES, FloatTile, instruction_set
from bidm_cli.packed.cpu.runtime.args import ATTENTION_JOB, record
from bidm_cli.packed.cpu.runtime.compile import attention_launchers
from bidm_cli.packed.cpu.runtime.threads import threads_for

PRODUCTS = 1 << 19
"""Multiply-accumulates that are worth a thread of their own, about 10 microseconds."""


class AttentionPlan:
    """Attention on one shape: workspaces and a record, as :class:`bidm_cli.packed.cpu.ops.conv.ConvPlan`."""

    def __init__(self, tile: FloatTile, shape: tuple[int, ...], threads: int) -> None:
        images, heads, queries, keys, width, value_width = shape
        wide = tile.lanes * tile.vectors
        padded_keys, padded_values = (-(-n // wide) * wide for n in (keys, value_width))
        padded_width = -(-width // tile.lanes) * tile.lanes
        self.columns = torch.zeros(images * heads, padded_width, padded_keys)
        self.values = torch.zeros(images * heads, keys, padded_values)
        # Rows a power of two apart would fall on the same lines of a cache.
        score_pitch = padded_keys + tile.lanes
        self.scores = torch.empty(threads, tile.rows, score_pitch)
        self.threads = threads
        sizes = {
            "images": images,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "width": width,
            "value_width": value_width,
            "columns": self.columns.data_ptr(),
            "values": self.values.data_ptr(),
            "scores": self.scores.data_ptr(),
            "score_pitch": score_pitch,
            "padded_width": padded_width,
            "padded_keys": padded_keys,
            "padded_values": padded_values,
        }
        self.job = record(ATTENTION_JOB, sizes)
        self.launches = attention_launchers(tile)
        self.at = self.job.ctypes.data

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        """q [N, heads, L, d], k [N, heads, M, d], v and out [N, heads, M or L, e]; last axes contiguous."""
        job = self.job
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
            job[name] = tensor.data_ptr()
            image, head, row, _ = tensor.stride()
            job[f"{name}_image"], job[f"{name}_head"], job[f"{name}_row"] = image, head, row
        job["exponent"] = scale * math.log2(math.e)
        for launch in self.launches:
            launch(self.at, self.threads, self)


@functools.lru_cache(maxsize=64)
def _plan(tile: FloatTile, shape: tuple[int, ...], threads: int, thread: int) -> AttentionPlan:
    return AttentionPlan(tile, shape, threads)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v, float32 on the CPU.

    q [N, heads, L, d], k [N, heads, M, d], v [N, heads, M, e] -> [N, heads, L, e], laid out in memory as
    [N, L, heads, e]. ``scale`` defaults to d^-1/2.
    """
    q, k, v = (
        x if x.stride(-1) == 1 and x.dtype == torch.float32 else x.float().contiguous() for x in (q, k, v)
    )
    n, heads, queries, width = q.shape
    shape = (n, heads, queries, k.shape[2], width, v.shape[3])
    out = torch.empty(n, queries, heads, v.shape[3]).transpose(1, 2)
    tile = FLOAT_TILES[instruction_set()]
    threads = threads_for(n * heads * queries * k.shape[2] * width, PRODUCTS)
    plan = _plan(tile, shape, threads, threading.get_ident())
    plan.run(q, k, v, out, width**-0.5 if scale is None else scale)
    return out
