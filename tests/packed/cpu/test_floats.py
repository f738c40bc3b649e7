"""What surrounds binary layers on the CPU: norms, FiLM, SiLU, attention, sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bidm_cli.networks.fusion import Fused, Prologue
from bidm_cli.networks.openai_blocks import ResBlock
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.cpu.ops import attention as attention_module
from bidm_cli.packed.cpu.ops.attention import attention
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES
from bidm_cli.packed.layers import RunsOnBackend
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import close, layer_of, norm_of, on, random


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        (32, (2, 32, 8, 8)),
        (32, (1, 224, 16, 12)),
        (3, (2, 33, 5, 7)),
        (1, (3, 70, 1, 1)),
        (8, (1, 40, 50, 50)),
        (4, (2, 20, 9)),
    ],
    ids=str,
)
def test_normalize_is_torchs_group_norm(groups: int, shape: tuple[int, ...], film: bool, silu: bool) -> None:
    x = random(shape, 3) * 2 + 0.5
    pair = random((shape[0], 2 * shape[1]), 4)
    scale, shift = pair.chunk(2, dim=1) if film else (None, None)
    prologue = Prologue(norm_of(groups, shape[1]), silu, scale, shift)
    close(NumbaBackend().normalize(x, prologue), TorchBackend().normalize(x, prologue))


def test_a_norm_without_weights() -> None:
    prologue = Prologue(norm_of(4, 32, affine=False))
    x = random((2, 32, 6, 6), 0)
    close(NumbaBackend().normalize(x, prologue), TorchBackend().normalize(x, prologue))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_mean_far_from_zero_costs_no_digits(threads: int) -> None:
    """Differences of 1 on top of 1000, which plain sums of squares would lose."""
    x = random((2, 64, 40, 40), 5) + 1000
    exact = F.group_norm(x.double(), 32, eps=1e-6).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = NumbaBackend().normalize(x, Prologue(norm_of(32, 64, affine=False)))
    finally:
        torch.set_num_threads(before)
    # The input itself is only good to 6e-5 there.
    assert (found - exact).abs().max() < 2e-4


def test_large_values_do_not_overflow_in_silu() -> None:
    norm = norm_of(1, 32, affine=False)
    scale = torch.full((1, 32), 500.0)
    x = random((1, 32, 4, 4), 1)
    prologue = Prologue(norm, True, scale, torch.zeros(1, 32))
    close(NumbaBackend().normalize(x, prologue), TorchBackend().normalize(x, prologue))


CONVOLUTIONS = {
    "same width": (nn.Conv2d(64, 64, 3, padding=1), BinarySpec()),
    "wider": (nn.Conv2d(32, 96, 3, padding=1), BinarySpec()),
    "narrower": (nn.Conv2d(96, 64, 3, padding=1), BinarySpec()),
    "a third": (nn.Conv2d(96, 32, 1), BinarySpec()),
    "odd": (nn.Conv2d(33, 45, 3, padding=1), BinarySpec()),
    "odd and narrower": (nn.Conv2d(45, 33, 3, padding=1), BinarySpec()),
    "stride": (nn.Conv2d(32, 32, 3, stride=2, padding=1), BinarySpec()),
    "no shortcut": (nn.Conv2d(64, 64, 3, padding=1), BinarySpec(shortcut="none")),
    "shortcut conv": (nn.Conv2d(64, 32, 3, padding=1), BinarySpec(shortcut="conv")),
    "weights only": (nn.Conv2d(64, 32, 3, padding=1), BinarySpec("float", shortcut="none")),
}


@pytest.mark.parametrize(
    "parts", ["norm", "norm+silu", "offset", "residual", "norm+silu+film+offset+residual"]
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers_with_what_surrounds_them(name: str, parts: str) -> None:
    """Signs are compared first, then the rest on layers whose signs agree."""
    layer = layer_of(*CONVOLUTIONS[name])
    c, o = layer.geometry.in_channels, layer.geometry.out_channels
    x = random((3, c, 6, 7), 1)
    prologue = None
    if "norm" in parts:
        film = random((3, 2 * c), 2).chunk(2, dim=1) if "film" in parts else (None, None)
        prologue = Prologue(norm_of(c // 3 if c % 3 == 0 else 8, c), "silu" in parts, *film)
    offset = random((3, o), 3) if "offset" in parts else None
    residual = random((3, o, *layer.geometry.output_size(6, 7)), 4) if "residual" in parts else None
    arguments = (layer.tensors, x, Fused(prologue, 1, offset, residual))
    numba, torch_ = NumbaBackend(), TorchBackend()
    if layer.spec.activations == "binary":
        assert torch.equal(
            numba.signs(layer.tensors, x, Fused(prologue)), torch_.signs(layer.tensors, x, Fused(prologue))
        )
    close(numba.run(*arguments), torch_.run(*arguments))


@pytest.mark.parametrize("shape", [(2, 40, 9), (1, 64, 33)])
def test_a_conv1d_with_norm_and_residual(shape: tuple[int, ...]) -> None:
    layer = layer_of(nn.Conv1d(shape[1], 24, 1), BinarySpec(activation_scale="none", shortcut="none"))
    prologue = Prologue(norm_of(8, shape[1]))
    residual = random((shape[0], 24, shape[2]), 2)
    arguments = (layer.tensors, random(shape, 1), Fused(prologue, residual=residual))
    close(NumbaBackend().run(*arguments), TorchBackend().run(*arguments))


@pytest.mark.parametrize(
    ("n", "heads", "queries", "keys", "width", "value_width"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 3, 37, 37, 20, 20),
        (1, 14, 64, 64, 32, 32),
        (2, 4, 50, 3, 24, 24),
        (1, 2, 5, 130, 16, 40),
        (2, 1, 70, 70, 130, 130),
    ],
)
def test_attention_is_torchs(
    n: int, heads: int, queries: int, keys: int, width: int, value_width: int
) -> None:
    q = random((n, heads, queries, width), 1) * 2
    k = random((n, heads, keys, width), 2) * 2
    v = random((n, heads, keys, value_width), 3)
    exact = [x.double() for x in (q, k, v)]
    close(attention(q, k, v), F.scaled_dot_product_attention(*exact).float())
    # Torch in float32 is as far from that, where scores are as large as 100.
    close(attention(q, k, v, scale=0.5), F.scaled_dot_product_attention(*exact, scale=0.5).float(), 5e-6)


def test_queries_that_share_a_panel_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are too large for a cache: the same bits as a tile of queries at a time."""
    monkeypatch.setattr(attention_module, "LEAST_SCORES", 1 << 62)
    q, k, v = (random((2, 3, rows, 24), seed) for seed, rows in enumerate((101, 67, 67)))
    alone = attention(q, k, v)
    monkeypatch.setattr(attention_module, "CACHED", 0)
    WORKSPACES._made.clear()
    assert torch.equal(attention(q, k, v), alone)
    WORKSPACES._made.clear()


def test_attention_reads_strided_views_and_survives_large_scores() -> None:
    tokens = random((2, 30, 3 * 64), 1) * 30
    q, k, v = (part.transpose(1, 2) for part in tokens.unflatten(2, (4, 3, 16)).unbind(3))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    close(attention(q, k, v), expected, 2e-5)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_fused_residual_blocks_compute_what_plain_ones_do(
    film: bool, resample: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = ResBlock(64, 96, 32, film=film, resample=resample).eval().requires_grad_(False)
    block.in_layers[2] = layer_of(block.in_layers[2], BinarySpec())
    block.out_layers[3] = layer_of(block.out_layers[3], BinarySpec())
    for layer in (block.in_layers[2], block.out_layers[3]):
        layer.bind(TorchBackend())
    x, embedding = random((2, 64, 8, 8), 1), random((2, 32), 2)
    with monkeypatch.context() as patch:
        patch.setattr(RunsOnBackend, "fuses", lambda module, prologue: False)
        expected = block(x, embedding)
    assert torch.equal(block(x, embedding), expected)
    on(block, NumbaBackend())
    close(block(x, embedding), expected, 1e-5)


def test_an_image_does_not_depend_on_its_batch_or_on_threads() -> None:
    """Bit for bit: samples must not change with the batch size."""
    layer = layer_of(nn.Conv2d(64, 96, 3, padding=1), BinarySpec())
    prologue = Prologue(norm_of(32, 64), silu=True)
    x, offset, residual = random((5, 64, 20, 20), 1), random((5, 96), 2), random((5, 96, 20, 20), 3)
    q, k, v = random((3, 5, 2, 50, 32), 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = layer(x, Fused(prologue, 1, offset, residual))
        attended = attention(q, k, v)
        torch.set_num_threads(1)
        for i in range(5):
            one = slice(i, i + 1)
            fused = Fused(prologue, 1, offset[one], residual[one])
            assert torch.equal(layer(x[one], fused), together[one])
            assert torch.equal(attention(q[one], k[one], v[one]), attended[one])
    finally:
        torch.set_num_threads(before)
