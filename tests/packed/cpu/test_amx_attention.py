"""Float attention on a matrix unit: against float64, in both precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.packed.cpu.ops import attention as attention_module
from bidm_cli.packed.cpu.ops.attention import AttentionPlan, BfloatPlan, MatrixPlan, Products, attention
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES
from tests.helpers import random

pytestmark = pytest.mark.skipif(instruction_set() != "amx", reason="needs a matrix unit")

TOLERANCES: dict[Products, float] = {"float32": 5e-6, "bfloat16": 3e-2}
PRECISIONS = pytest.mark.parametrize("products", TOLERANCES)


@pytest.fixture(autouse=True)
def _matrix_unit_for_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_module,
        "_float_plan",
        lambda q, v, products: BfloatPlan if products == "bfloat16" else MatrixPlan,
    )


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v.double()).float()


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(float(expected.abs().max()), 1))


SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 37, 37, 20, 20),
    (1, 2, 32, 32, 32, 32),
    (2, 2, 33, 31, 33, 31),
    (1, 3, 64, 128, 64, 16),
    (2, 4, 50, 3, 24, 24),
    (1, 2, 5, 130, 16, 40),
    (1, 8, 90, 77, 40, 40),
    (2, 1, 70, 70, 130, 130),
    (1, 2, 300, 529, 8, 72),
    (1, 1, 40, 1000, 512, 512),
]


@PRECISIONS
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention_in_float64(shape: tuple[int, ...], threads: int, products: Products) -> None:
    n, heads, queries, keys, width, value_width = shape
    q, k = random((n, heads, queries, width), 1) * 1.5, random((n, heads, keys, width), 2) * 1.5
    v = random((n, heads, keys, value_width), 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for scale in (None, 0.3):
            near(attention(q, k, v, scale, products), exact(q, k, v, scale), TOLERANCES[products])
    finally:
        torch.set_num_threads(before)


def test_strided_views_and_large_scores() -> None:
    tokens = random((2, 100, 3 * 64), 1) * 30
    q, k, v = (part.transpose(1, 2) for part in tokens.unflatten(2, (4, 3, 16)).unbind(3))
    near(attention(q, k, v), exact(q, k, v), 2e-5)


def test_scores_that_grow_along_the_keys() -> None:
    """The largest score is raised block by block, in some queries only."""
    q, k, v = random((1, 2, 70, 32), 1), random((1, 2, 700, 32), 2), random((1, 2, 700, 32), 3)
    k = k * torch.linspace(0, 40, 700)[:, None]
    q[:, :, ::2] *= 0.01
    near(attention(q, k, v), exact(q, k, v), 1e-5)


def test_no_query_depends_on_its_neighbours_or_on_how_many_share_the_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = random((1, 1, 300, 40), 1) * 3, random((1, 1, 300, 40), 2) * 3, random((1, 1, 300, 40), 3)
    together = attention(q, k, v)
    for row in (0, 31, 150, 299):
        assert torch.equal(attention(q[:, :, row : row + 1], k, v), together[:, :, row : row + 1])
    monkeypatch.setattr(attention_module, "CACHED_PANELS", 0)
    WORKSPACES._made.clear()
    assert torch.equal(attention(q, k, v), together)
    WORKSPACES._made.clear()


@PRECISIONS
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
def test_nan_stays(payload: int, products: Products) -> None:
    nan = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
    q, k, v = (random((1, 2, 70, 20), seed) for seed in range(3))
    for place, rows in ((q, slice(5, 6)), (k, slice(None)), (v, slice(None))):
        inputs = [x.clone() for x in (q, k, v)]
        broken = inputs[[x is place for x in (q, k, v)].index(True)]
        broken[0, 1, 5, 3] = nan
        found = attention(*inputs, products=products).isnan()
        assert not found[0, 0].any()
        columns = slice(3, 4) if place is v else slice(None)
        assert found[0, 1, rows, columns].all()
        assert found.sum() == found[0, 1, rows, columns].numel()


@pytest.mark.parametrize(
    ("queries", "keys", "products", "expected"),
    [
        (8, 8, "float32", AttentionPlan),
        (16, 1024, "bfloat16", AttentionPlan),
        (64, 64, "float32", AttentionPlan),
        (64, 64, "bfloat16", BfloatPlan),
        (256, 77, "float32", MatrixPlan),
    ],
)
def test_few_scores_are_left_to_vectors(
    queries: int, keys: int, products: Products, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    q, v = torch.empty(1, 1, queries, 8), torch.empty(1, 1, keys, 8)
    assert attention_module._float_plan(q, v, products) is expected
