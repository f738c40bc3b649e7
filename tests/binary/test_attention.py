"""Binary attention: the formula with loops, gradients in closed form, and what surgery does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bidm_cli.binary.attention import BinaryAttention, binary_attention
from bidm_cli.binary.sign import sign
from bidm_cli.binary.surgery import binarize
from bidm_cli.networks.layers import AttentionProduct
from bidm_cli.networks.registry import build
from bidm_cli.recipe import Recipe
from tests.report.models import TINY_DDPM


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def scores_by_hand(q: Tensor, k: Tensor, gamma: Tensor, scale: float) -> Tensor:
    n, heads, length, width = q.shape
    scores = torch.zeros(n, heads, length, k.shape[2], dtype=q.dtype)
    for b, h, i, j in ((b, h, i, j) for b in range(n) for h in range(heads) for i in range(length)
                       for j in range(k.shape[2])):  # fmt: skip
        x, y = q[b, h, i].tolist(), k[b, h, j].tolist()
        dot = sum((1 if s >= 0 else -1) * (1 if t >= 0 else -1) for s, t in zip(x, y, strict=True))
        means = sum(map(abs, x)) / width * sum(map(abs, y)) / width
        scores[b, h, i, j] = abs(float(gamma[h])) * means * scale * dot
    return scores


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_formula(scale: float | None) -> None:
    q, k, v, gamma = tensors((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7), (3,))
    q[0, 0, 0, 0] = 0.0
    scores = scores_by_hand(q, k, gamma, 5**-0.5 if scale is None else scale)
    expected = scores.softmax(dim=-1) @ v
    torch.testing.assert_close(binary_attention(q, k, v, sign(q), sign(k), gamma, scale), expected)


def test_gradients_are_the_straight_through_ones() -> None:
    """Through the softmax by hand, then through sign (2 - 2|x| inside 1) and mean magnitude (sign / d)."""
    q, k, v, gamma, upstream = tensors((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6), (2,), (1, 2, 3, 6))
    module = BinaryAttention(2).double()
    with torch.no_grad():
        module.score_scale.copy_(gamma)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    module(q, k, v).backward(upstream)

    scale, width = 4**-0.5, 4
    with torch.no_grad():
        a_q, a_k = q.abs().mean(-1, keepdim=True), k.abs().mean(-1, keepdim=True)
        g = gamma.abs()[:, None, None] * scale
        p = (g * (sign(q) * a_q) @ (sign(k) * a_k).mT).softmax(-1)
        d_p = upstream @ v.mT
        d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True))
        for x, a, other in ((q, a_q, sign(k) * a_k), (k, a_k, sign(q) * a_q)):
            d = (d_s if x is q else d_s.mT) @ other * g  # gradient of sign(x) * a
            through_sign = d * a * (2 - 2 * x.abs()).clamp(min=0)
            through_mean = (d * sign(x)).sum(-1, keepdim=True) * sign(x) / width
            torch.testing.assert_close(x.grad, through_sign + through_mean)
        raw = (sign(q) * a_q) @ (sign(k) * a_k).mT * scale
        torch.testing.assert_close(module.score_scale.grad, (d_s * raw).sum((0, 2, 3)) * sign(gamma))
        torch.testing.assert_close(v.grad, p.mT @ upstream)


def test_gamma_of_one_starts_near_the_float_scores() -> None:
    """The XNOR approximation: on random vectors the binary scores correlate with the real ones."""
    q, k = tensors((1, 1, 200, 64), (1, 1, 200, 64))
    real, binary = (q @ k.mT).flatten(), scores_by_hand(q[:, :, :50], k[:, :, :50], torch.ones(1), 1.0)
    correlation = torch.corrcoef(torch.stack([real.reshape(200, 200)[:50, :50].flatten(), binary.flatten()]))
    assert correlation[0, 1] > 0.5
    ratio = float(binary.std() / real.std())
    assert math.isclose(ratio, 2 / math.pi, rel_tol=0.1), "E|x|^2 of a standard normal"


def test_surgery_swaps_the_products_only_where_asked() -> None:
    for name, kind in (("w1a1", AttentionProduct), ("w1a1-attention", BinaryAttention)):
        network = build({"kind": "ddpm_unet", "args": TINY_DDPM})
        binarize(network, Recipe.load(name), 1000)
        products = [m for m in network.modules() if isinstance(m, AttentionProduct)]
        assert len(products) == 4 and all(type(product) is kind for product in products)


def test_one_scale_a_head() -> None:
    args = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [1],
            "num_res_blocks": 1, "channel_mult": [1], "num_heads": 4}  # fmt: skip
    network = build({"kind": "ldm_unet", "args": args})
    binarize(network, Recipe.parse(
        'name: x\nlayers: [{role: "*", binarize: {}}]\nattention: {scores: binary}\n'), 1000)  # fmt: skip
    products = [m for m in network.modules() if isinstance(m, BinaryAttention)]
    assert products and all(product.score_scale.shape == (4,) for product in products)
