"""Attention on the CPU, with float and with binary scores (formula: :mod:`bidm_cli.binary.attention`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bidm_cli.packed.cpu.codegen.isa import FLOAT_TILES, MATRIX_SIDE, FloatTile, instruction_set
from bidm_cli.packed.cpu.ops import kernels
from bidm_cli.packed.cpu.ops.structs import (
    ATTENTION_ARGS,
    BINARY_ATTENTION_ARGS,
    MATRIX_ATTENTION_ARGS,
    MATRIX_PANELS,
    MOST_BLOCKS,
    MOST_TILES,
)
from bidm_cli.packed.cpu.runtime.args import record
from bidm_cli.packed.cpu.runtime.compile import Kernel
from bidm_cli.packed.cpu.runtime.kernels import launcher_of
from bidm_cli.packed.cpu.runtime.threads import most_threads
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES
from bidm_cli.packed.format.bits import words_per_tap
from bidm_cli.packed.uses import Products

PRODUCTS = 1 << 19
"""Multiply-accumulates that are worth a thread of their own, about 10 microseconds."""

LEAST_SCORES = 1 << 12
"""Scores of a head per part from which on a matrix unit is faster, at any width, given a block of queries."""

CACHED_PANELS = 1 << 8
"""Parts of blocks of a head's keys and values that stay in a core's cache, 2 KB each."""

CACHED = 1 << 16
"""Numbers in a head's keys that stay in a core's cache beside its values."""

_LOG2_E = math.log2(math.e)
_SHAPE = ("images", "heads", "queries", "keys", "width", "value_width")
_CALL = [f"{name}{axis}" for name in ("q", "k", "v", "out") for axis in ("", "_image", "_head", "_row")]
"""Addresses and strides that calls fill in."""

Shape = tuple[int, int, int, int, int, int]
"""As ``_SHAPE``."""

Fields = tuple[dict[str, Tensor], dict[str, int]]
"""Workspaces and sizes, by field."""


class _Plan:
    """Execution plan for attention on one shape: workspaces and kernel arguments of both kinds of scores."""

    args: np.dtype
    launched: Callable[[], tuple[Kernel, Kernel]]
    per_call: tuple[str, ...] = ()

    def __init__(self, shape: Shape, threads: int) -> None:
        places, sizes = self._workspaces(shape, threads)
        addresses = {name: place.data_ptr() for name, place in places.items()}
        self.places, self._threads = places, threads
        fields = (*_CALL, *self.per_call)
        values = dict(zip(_SHAPE, shape, strict=True)) | sizes | addresses
        self._args = record(self.args, values, fields)
        self._call, self._address = self._args[list(fields)], self._args.ctypes.data
        self._launches = [launcher_of(kernel) for kernel in type(self).launched()]

    def _workspaces(self, shape: Shape, threads: int) -> Fields:
        """Workspaces and sizes."""
        raise NotImplementedError

    def _run(self, tensors: tuple[Tensor, ...], *values: float) -> None:
        """Run on q, k, v and out as in :func:`attention`, with the values of ``per_call``."""
        places = (number for tensor in tensors for number in (tensor.data_ptr(), *tensor.stride()[:3]))
        self._call[0] = (*places, *values)
        for launch in self._launches:
            launch(self._address, self._threads, self)


class _VectorPlan(_Plan):
    """Execution plan that multiplies by vectors, for both kinds of scores."""

    def _workspaces(self, shape: Shape, threads: int) -> Fields:
        images, heads, _, keys, _, value_width = shape
        tile = FLOAT_TILES[instruction_set()]
        wide = tile.lanes * tile.vectors
        padded_keys, padded_values = (-(-n // wide) * wide for n in (keys, value_width))
        # Rows a power of two apart would fall on the same lines of a cache.
        score_pitch = padded_keys + tile.lanes
        places, sizes = self._scores(tile, shape, padded_keys, threads)
        places["values"] = torch.zeros(images * heads, keys, padded_values)
        rows = sizes.get("tiles", 1) * tile.rows
        places["scores"] = torch.empty(threads, rows, score_pitch)
        sizes |= {"score_pitch": score_pitch, "padded_keys": padded_keys, "padded_values": padded_values}
        return places, sizes

    def _scores(self, tile: FloatTile, shape: Shape, padded_keys: int, threads: int) -> Fields:
        """Workspaces and sizes for one kind of scores."""
        raise NotImplementedError


class AttentionPlan(_VectorPlan):
    """Execution plan for attention with float scores on one shape."""

    args = ATTENTION_ARGS
    launched = staticmethod(kernels.attention)
    per_call = ("exponent",)

    def _scores(self, tile: FloatTile, shape: Shape, padded_keys: int, threads: int) -> Fields:
        padded_width = -(-shape[4] // tile.lanes) * tile.lanes
        columns = torch.zeros(shape[0] * shape[1], padded_width, padded_keys)
        in_cache = columns[0].numel() <= CACHED
        return {"columns": columns}, {"padded_width": padded_width, "tiles": 1 if in_cache else MOST_TILES}

    def run(self, tensors: tuple[Tensor, ...], scale: float) -> None:
        """Run on (q, k, v, out), shapes as in :func:`attention`, last axes contiguous."""
        self._run(tensors, scale * _LOG2_E)


class MatrixPlan(_Plan):
    """Execution plan for attention with float scores on a matrix unit; float32's precision by three parts."""

    args = MATRIX_ATTENTION_ARGS
    per_call = ("exponent",)
    parts = kernels.PARTS["float32"]

    @classmethod
    def launched(cls) -> tuple[Kernel, Kernel]:
        """Return the kernels."""
        return kernels.matrix_attention(cls.parts)

    def _workspaces(self, shape: Shape, threads: int) -> Fields:
        images, heads, queries, *lengths = shape
        keys, width, value_width = (-(-length // MATRIX_SIDE) for length in lengths)
        # Queries that share the keys and values that are read, if those are too many for a cache.
        panels = keys * (width + value_width) * self.parts
        whole = -(-queries // MATRIX_SIDE)
        share = -(-images * heads * whole // threads)
        blocks = min(whole, share, 4 if panels <= CACHED_PANELS else MOST_BLOCKS)
        panel = (MATRIX_SIDE, MATRIX_SIDE)

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, *panel, dtype=torch.bfloat16)

        places = {
            "key_panels": zeros(images * heads, keys, width, self.parts),
            "value_panels": zeros(images * heads, value_width, keys, self.parts),
            "query_panels": zeros(threads, blocks, width, self.parts),
            "products": torch.empty(threads, blocks, value_width, *panel),
            "tasks": torch.empty(threads, value_width + MATRIX_PANELS, 5, dtype=torch.int64),
        }
        return places, {"blocks": blocks}

    def run(self, tensors: tuple[Tensor, ...], scale: float) -> None:
        """Run as :meth:`AttentionPlan.run`."""
        self._run(tensors, scale * _LOG2_E)


class BfloatPlan(MatrixPlan):
    """The same, to bfloat16's precision."""

    parts = kernels.PARTS["bfloat16"]


class BinaryAttentionPlan(_VectorPlan):
    """Execution plan for attention with binary scores on one shape."""

    args = BINARY_ATTENTION_ARGS
    launched = staticmethod(kernels.binary_attention)

    def _scores(self, tile: FloatTile, shape: Shape, padded_keys: int, threads: int) -> Fields:
        pairs, words = shape[0] * shape[1], words_per_tap(shape[4])
        places = {
            "key_words": torch.zeros(pairs, padded_keys * words, dtype=torch.int32),
            "key_means": torch.zeros(pairs, padded_keys),
            "query_words": torch.zeros(threads, tile.rows, words, dtype=torch.int32),
            "head_factors": torch.empty(shape[1]),
        }
        return places, {"words": words}

    def run(self, tensors: tuple[Tensor, ...], factors: Tensor) -> None:
        """Run as :meth:`AttentionPlan.run`; ``factors`` [heads] or [1] multiply the scores."""
        torch.mul(factors, _LOG2_E, out=self.places["head_factors"])
        self._run(tensors)


Plan = TypeVar("Plan", bound=_Plan)


def _planned(
    kind: type[Plan], q: Tensor, k: Tensor, v: Tensor, depth: int
) -> tuple[Plan, tuple[Tensor, ...]]:
    """The plan for these inputs, and (q, k, v, out) for it; ``depth``: products per score."""
    tensors = (
        x if x.stride(-1) == 1 and x.dtype == torch.float32 else x.float().contiguous() for x in (q, k, v)
    )
    n, heads, queries, width = q.shape
    keys, value_width = v.shape[2:]
    out = torch.empty(n, queries, heads, value_width).transpose(1, 2)
    shape = (n, heads, queries, keys, width, value_width)
    threads = min(torch.get_num_threads(), most_threads(n * heads * queries * keys * depth, PRODUCTS))
    return WORKSPACES.get((kind, shape, threads), lambda: kind(shape, threads)), (*tensors, out)


def has_bfloat16() -> bool:
    """True if bfloat16 products are faster than float32 ones on this machine."""
    return instruction_set() == "amx"


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, products: Products = "float32"
) -> Tensor:
    """softmax(q k^T scale) v, float32 on the CPU.

    q [N, heads, L, d], k [N, heads, M, d], v [N, heads, M, e] -> [N, heads, L, e], laid out in memory as
    [N, L, heads, e]. ``scale`` defaults to d^-1/2. ``products``: precision of both products' factors;
    "bfloat16" is computed as "float32" where that is not slower, and always without a matrix unit.
    """
    width = q.shape[-1]
    plan, tensors = _planned(_float_plan(q, v, products), q, k, v, width)
    plan.run(tensors, width**-0.5 if scale is None else scale)
    return tensors[-1]


def _float_plan(q: Tensor, v: Tensor, products: Products) -> type[AttentionPlan] | type[MatrixPlan]:
    """The kind of plan that is fastest; the same for every batch size, as its result is other bits."""
    if not has_bfloat16():
        return AttentionPlan
    kind = BfloatPlan if products == "bfloat16" else MatrixPlan
    queries, keys = q.shape[2], v.shape[2]
    return kind if queries >= MATRIX_SIDE and queries * keys >= LEAST_SCORES * kind.parts else AttentionPlan


def binary_attention(
    q: Tensor, k: Tensor, v: Tensor, score_scale: Tensor, scale: float | None = None
) -> Tensor:
    """Attention with binary scores; shapes and memory layout as :func:`attention`, score_scale [heads]."""
    # The values' product is most of the work.
    plan, tensors = _planned(BinaryAttentionPlan, q, k, v, v.shape[-1])
    factors = score_scale.abs() * (q.shape[-1] ** -0.5 if scale is None else scale)
    plan.run(tensors, factors.expand(q.shape[1]))
    return tensors[-1]
