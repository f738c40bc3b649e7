"""Attention on the CPU, with float and with binary scores (formula: :mod:`bidm_cli.binary.attention`)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bidm_cli.packed.cpu.codegen.isa import FLOAT_TILES, FloatTile, instruction_set
from bidm_cli.packed.cpu.ops.attention_kernel import ATTENTION_ARGS, arrange_launcher, attend_launcher
from bidm_cli.packed.cpu.ops.binary_attention_kernel import (
    BINARY_ATTENTION_ARGS,
    arrange_binary_launcher,
    attend_binary_launcher,
)
from bidm_cli.packed.cpu.runtime.args import record
from bidm_cli.packed.cpu.runtime.threads import Launch, most_threads
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES
from bidm_cli.packed.format.bits import words_per_tap

PRODUCTS = 1 << 19
"""Multiply-accumulates that are worth a thread of their own, about 10 microseconds."""

_LOG2_E = math.log2(math.e)
_AXES = tuple(f"{name}{axis}" for name in ("q", "k", "v", "out") for axis in ("", "_image", "_head", "_row"))
"""Fields of addresses and strides, in the order in which calls fill them in."""

Shape = tuple[int, int, int, int, int, int]
"""(images, heads, queries, keys, width, value width)."""


class _Plan:
    """Execution plan for attention on one shape: the workspaces and arguments of both kinds of scores.

    Args:
        places: workspaces of one kind by field, beside the shared ones. sizes: its other fixed fields.
        per_call: its fields that calls fill in after the shared ones.
    """

    def __init__(
        self,
        kind: np.dtype,
        launchers: tuple[Launch, Launch],
        shape: Shape,
        threads: int,
        places: dict[str, Tensor],
        sizes: dict[str, int],
        per_call: tuple[str, ...] = (),
    ) -> None:
        images, heads, queries, keys, width, value_width = shape
        tile = _tile()
        padded_keys, padded_values = _padded(keys), _padded(value_width)
        # Rows a power of two apart would fall on the same lines of a cache.
        score_pitch = padded_keys + tile.lanes
        self.places = {
            **places,
            "values": torch.zeros(images * heads, keys, padded_values),
            "scores": torch.empty(threads, tile.rows, score_pitch),
        }
        values = {
            **{name: place.data_ptr() for name, place in self.places.items()},
            **sizes,
            "images": images,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "width": width,
            "value_width": value_width,
            "score_pitch": score_pitch,
            "padded_keys": padded_keys,
            "padded_values": padded_values,
        }
        self._threads, self._launchers = threads, launchers
        self._args = record(kind, values, (*_AXES, *per_call))
        self._call, self._address = self._args[[*_AXES, *per_call]], self._args.ctypes.data

    def _run(self, tensors: tuple[Tensor, ...], *values: float) -> None:
        places = [number for tensor in tensors for number in (tensor.data_ptr(), *tensor.stride()[:3])]
        self._call[0] = (*places, *values)
        for launch in self._launchers:
            launch(self._address, self._threads, self)


class AttentionPlan(_Plan):
    """Execution plan for attention with float scores on one shape."""

    def __init__(self, shape: Shape, threads: int) -> None:
        tile, padded_width = _tile(), -(-shape[4] // _tile().lanes) * _tile().lanes
        places = {"columns": torch.zeros(shape[0] * shape[1], padded_width, _padded(shape[3]))}
        launchers = arrange_launcher(tile), attend_launcher(tile)
        sizes = {"padded_width": padded_width}
        super().__init__(ATTENTION_ARGS, launchers, shape, threads, places, sizes, ("exponent",))

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        """Run on q [N, heads, L, d], k [N, heads, M, d], v and out [N, heads, M or L, e]; last axes contiguous."""
        self._run((q, k, v, out), scale * _LOG2_E)


class BinaryAttentionPlan(_Plan):
    """Execution plan for attention with binary scores on one shape."""

    def __init__(self, shape: Shape, threads: int) -> None:
        tile, words = _tile(), words_per_tap(shape[4])
        pairs, padded_keys = shape[0] * shape[1], _padded(shape[3])
        places = {
            "key_words": torch.zeros(pairs, padded_keys * words, dtype=torch.int32),
            "key_means": torch.zeros(pairs, padded_keys),
            "query_words": torch.zeros(threads, tile.rows, words, dtype=torch.int32),
            "head_factors": torch.empty(shape[1]),
        }
        launchers = arrange_binary_launcher(tile), attend_binary_launcher(tile)
        super().__init__(BINARY_ATTENTION_ARGS, launchers, shape, threads, places, {"words": words})

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, factors: Tensor) -> None:
        """Run on shapes as in :meth:`AttentionPlan.run`; ``factors`` [heads] or [1] multiply the scores."""
        torch.mul(factors, _LOG2_E, out=self.places["head_factors"])
        self._run((q, k, v, out))


def _tile() -> FloatTile:
    return FLOAT_TILES[instruction_set()]


def _padded(columns: int) -> int:
    """Columns filled up to whole panels."""
    wide = _tile().lanes * _tile().vectors
    return -(-columns // wide) * wide


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Shape]:
    """Inputs as the kernels read them, the output, and the shape of it all."""
    q, k, v = (
        x if x.stride(-1) == 1 and x.dtype == torch.float32 else x.float().contiguous() for x in (q, k, v)
    )
    n, heads, queries, width = q.shape
    out = torch.empty(n, queries, heads, v.shape[3]).transpose(1, 2)
    return (q, k, v), out, (n, heads, queries, k.shape[2], width, v.shape[3])


def _threads(products: int) -> int:
    return min(torch.get_num_threads(), most_threads(products, PRODUCTS))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v, float32 on the CPU.

    q [N, heads, L, d], k [N, heads, M, d], v [N, heads, M, e] -> [N, heads, L, e], laid out in memory as
    [N, L, heads, e]. ``scale`` defaults to d^-1/2.
    """
    inputs, out, shape = _prepared(q, k, v)
    n, heads, queries, keys, width, _ = shape
    threads = _threads(n * heads * queries * keys * width)
    plan = WORKSPACES.get((AttentionPlan, shape, threads), lambda: AttentionPlan(shape, threads))
    plan.run(*inputs, out, width**-0.5 if scale is None else scale)
    return out


def binary_attention(
    q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
) -> Tensor:
    """Attention with binary scores; shapes and memory layout as :func:`attention`, score_scale [heads]."""
    inputs, out, shape = _prepared(q, k, v)
    n, heads, queries, keys, width, value_width = shape
    # The values' product is most of the work.
    threads = _threads(n * heads * queries * keys * value_width)
    plan = WORKSPACES.get((BinaryAttentionPlan, shape, threads), lambda: BinaryAttentionPlan(shape, threads))
    factors = score_scale.abs() * (width**-0.5 if scale is None else scale)
    plan.run(*inputs, out, factors.expand(heads))
    return out
