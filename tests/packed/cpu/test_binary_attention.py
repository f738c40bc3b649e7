"""Binary attention in packed files and on the CPU, against the reference and the trained student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch

from bidm_cli.binary.attention import BinaryAttention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.unpack import float_weights
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.layers import PackedBinaryAttention
from bidm_cli.recipe import Recipe
from bidm_cli.report.sign_flips import count_sign_flips
from tests.helpers import random
from tests.packed.test_packed_model import packed, rounded

RECIPE = "w1a1-attention"
SHAPES = [
    (1, 4, 64, 64, 32, 32),
    (2, 3, 7, 5, 33, 40),
    (1, 1, 65, 64, 448, 448),
    (2, 2, 9, 77, 64, 20),
    (3, 1, 1, 1, 1, 1),
    (1, 2, 130, 3, 31, 100),
]


def inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    n, heads, length, keys, width, value_width = shape
    sizes = ((n, heads, length, width), (n, heads, keys, width), (n, heads, keys, value_width))
    q, k, v = (random(size, seed) for seed, size in enumerate(sizes))
    return q, k, v, random((heads,), 3)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numba_agrees_with_the_reference(shape: tuple[int, ...], threads: int) -> None:
    q, k, v, gamma = inputs(shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = NumbaBackend().binary_attention(q, k, v, gamma, 0.2)
    finally:
        torch.set_num_threads(before)
    expected = TorchBackend().binary_attention(q, k, v, gamma, 0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 96, 200])
def test_the_integers_are_exact(width: int) -> None:
    """Values that are the identity give the softmax itself, whose logarithms tell the products of signs."""
    q, k = (random((1, 2, n, width), seed).sign() for seed, n in enumerate((11, 40)))
    k[0, 0, 3] = 0.0  # the sign of 0 is +1; of magnitude 0, so the score is 0
    q[0, 1, 2, 0] = float("nan")
    v = torch.eye(40).expand(1, 2, 40, 40)
    scale = 0.05
    found = NumbaBackend().binary_attention(q, k, v, torch.ones(2), scale).log() / scale
    signs = [torch.where(x >= 0, 1.0, -1.0) for x in (q, k)]
    expected = signs[0] @ signs[1].mT * k.abs().mean(-1)[:, :, None]
    whole = torch.arange(11) != 2
    for head in range(2):
        rows = whole if head else slice(None)
        a, b = found[0, head][rows], expected[0, head][rows]
        assert torch.equal((a - a[:, :1]).round(), (b - b[:, :1]).round())
    assert not found[0, 1, 2].isfinite().any(), "NaN is not hidden"


def test_strided_inputs_and_queries_of_zero() -> None:
    qkv = random((2, 9, 2, 3, 32), 0)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
    backends = NumbaBackend(), TorchBackend()
    found, expected = (b.binary_attention(q, k, v, torch.ones(1)) for b in backends)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found = NumbaBackend().binary_attention(torch.zeros_like(q), k, v, torch.ones(1))
    torch.testing.assert_close(found, v.mean(2, keepdim=True).expand_as(found), rtol=0, atol=1e-6)


def test_the_cupy_backend_takes_half_precision() -> None:
    from bidm_cli.packed.backends.cupy import CupyBackend

    q, k, v, gamma = inputs(SHAPES[1])
    found = CupyBackend().binary_attention(q.half(), k.half(), v.half(), gamma)
    assert found.dtype == torch.float16
    expected = TorchBackend().binary_attention(q.half().float(), k.half().float(), v, gamma)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=5e-3)


def trained(student: Callable[..., DiffusionModel]) -> DiffusionModel:
    model = student(RECIPE)
    with torch.no_grad():
        for i, module in enumerate(m for m in model.unet.modules() if isinstance(m, BinaryAttention)):
            module.score_scale.add_(0.3 * (i + 1))
    return model


def test_packed_is_the_student(student: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    model = trained(student)
    opened = packed(model, RECIPE, tmp_path)
    assert sum(isinstance(m, PackedBinaryAttention) for m in opened.unet.modules()) == 4
    x, t = random((3, 1, 8, 8), 0), torch.tensor([999, 500, 0])
    with torch.no_grad():
        assert torch.equal(opened.denoise(x, t), rounded(model).denoise(x, t))


def test_backends_agree_on_a_network(student: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    opened = packed(trained(student), RECIPE, tmp_path)
    numba = load_packed(tmp_path / "m.bidm", backend="numba")
    flips = count_sign_flips(opened, numba, random((2, 1, 8, 8), 1), torch.tensor([900, 30]))
    products = [name for name in flips.by_layer if name.endswith("product")]
    assert len(products) == 4 and flips.by_layer[products[0]][1] == 2 * 2 * 16 * 64
    assert flips.rate < 1e-3


def test_the_file_says_so_and_older_readers_are_told(
    student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    """Version 1 readers name both versions and the way out; files without binary attention stay version 1."""
    for recipe, version in (("bidm", 1), (RECIPE, 2)):
        settings = Recipe.load(recipe).override("distill", predict="teacher")
        metadata, tensors = pack_model(student(recipe), settings.to_json())
        write_packed(tmp_path / "m.bidm", metadata, tensors)
        with safetensors.safe_open(tmp_path / "m.bidm", "pt") as handle:
            assert json.loads(handle.metadata()["bidm"])["format_version"] == version
    metadata, tensors = read_packed(tmp_path / "m.bidm")
    assert metadata["attention"][0] == {"name": "down.1.attn.0.product", "scores": "binary", "heads": 1}
    assert tensors["unet.down.1.attn.0.product.score_scale"].dtype == torch.float16
    assert "score_scale" not in " ".join(float_weights(load_packed(tmp_path / "m.bidm")))


def test_tables_that_make_no_sense(student: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    metadata, tensors = pack_model(student(RECIPE), Recipe.load(RECIPE).to_json())
    good = metadata["attention"]
    for wrong, message in (
        ([{**good[0], "heads": 0}], "makes no sense"),
        ([{**good[0], "scores": "ternary"}], "makes no sense"),
        ([{**good[0], "name": "down.7"}, *good], "no attention 'down.7'"),
        (good[1:], "not expected"),
        ([{**good[0], "heads": 2}, *good[1:]], "has not the 2 heads"),
        ({"a": 1}, "makes no sense"),
    ):
        write_packed(tmp_path / "m.bidm", {**metadata, "attention": wrong}, tensors)
        with pytest.raises(BidmError, match=message):
            load_packed(tmp_path / "m.bidm")
