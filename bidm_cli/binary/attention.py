"""Attention with binary scores: binary queries and keys, a float softmax and float values.

    s_ij = |gamma_h| A_q(i) A_k(j) scale  sum over c of sign(q_ic) sign(k_jc)
    y_i  = sum over j of softmax_j(s_ij) v_j

A_q and A_k are the means of |q| and |k| over a token's channels: XNOR-Net's approximation of a product of
two real vectors (arXiv 1603.05279, sec. 3.2). gamma, one number per head, is learned and starts at 1. The
signs need no thresholds: the projections that make q and k keep the bias of the original network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.binary.sign import sign_activation
from bidm_cli.networks.layers import AttentionProduct


def binary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_signs: Tensor,
    k_signs: Tensor,
    score_scale: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attention with binary scores, shared by training and by the packed reference so that both round alike.

    q [N, heads, L, d], k [N, heads, M, d], their signs, v [N, heads, M, e], score_scale [heads] (or [1]) ->
    [N, heads, L, e]. ``scale`` defaults to d^-1/2. The scales are multiplied onto the signs, so that torch's
    fused attention runs it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gamma = (score_scale.abs() * scale)[:, None, None]
    q_scale = q.abs().mean(dim=-1, keepdim=True) * gamma
    k_scale = k.abs().mean(dim=-1, keepdim=True)
    return F.scaled_dot_product_attention(q_signs * q_scale, k_signs * k_scale, v, scale=1.0)


class BinaryAttention(AttentionProduct):
    """Trainable attention with binary scores; the signs have the gradient of activations' signs.

    Attributes:
        score_scale: gamma [heads].
    """

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.score_scale = nn.Parameter(torch.ones(heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return binary_attention(q, k, v, sign_activation(q), sign_activation(k), self.score_scale, scale)

    def extra_repr(self) -> str:
        return f"{len(self.score_scale)} heads, binary scores"
