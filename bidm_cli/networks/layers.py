"""Parts shared by all network definitions: layer roles, feature points, padding, attention.

A network marks what each of its layers is for with :func:`with_role`; a recipe selects layers by that role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.fusion import Features

Layer = TypeVar("Layer", bound=nn.Module)

ROLES: dict[str, str] = {
    "stem": "first convolution or patch embedding",
    "head": "last convolution or projection",
    "time_embedding": "layers that turn the timestep into the embedding vector",
    "class_embedding": "layers that turn a label into the embedding vector",
    "time_projection": "projection of the embedding into one block",
    "conv": "3x3 convolution of a residual block",
    "skip": "1x1 (or 3x3) convolution on a residual block's shortcut, where the width changes",
    "attention_qkv": "query, key and value projections",
    "attention_out": "projection of the attention's result",
    "transformer_in": "projection into a spatial transformer",
    "transformer_out": "projection out of a spatial transformer",
    "feed_forward": "linear layers of a transformer's MLP",
    "resample": "convolution of a down- or upsampler",
    "other": "a layer that its network gives no role",
}


def with_role(layer: Layer, role: str) -> Layer:
    """Mark ``layer`` with one of :data:`ROLES` and return it."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; one of {', '.join(ROLES)}")
    layer.role = role  # type: ignore[assignment]
    return layer


def role_of(layer: nn.Module) -> str:
    """The role a network gave to ``layer``; ``"other"`` if it gave none."""
    return str(getattr(layer, "role", "other"))


def by_name_only(layer: Layer) -> Layer:
    """Mark ``layer`` as one that a recipe's rules take by its name alone, not by a role; returns it."""
    layer.by_name_only = True  # type: ignore[assignment]
    return layer


def is_by_name_only(layer: nn.Module) -> bool:
    """True for a layer that :func:`by_name_only` marked."""
    return bool(getattr(layer, "by_name_only", False))


@dataclass(frozen=True)
class Block:
    """One feature point of a network: the output of the submodule ``name``.

    SPD compares the features of teacher and student there; connections blend them across timesteps.
    """

    name: str
    stage: Literal["encoder", "middle", "decoder"]


def feature_points(encoder: Iterable[str], middle: Iterable[str], decoder: Iterable[str]) -> list[Block]:
    """Blocks of these names, in the order of execution."""
    stages = (("encoder", encoder), ("middle", middle), ("decoder", decoder))
    return [Block(name, stage) for stage, names in stages for name in names]  # type: ignore[arg-type]


@dataclass(frozen=True)
class NetworkInputs:
    """Inputs that a denoising network declares.

    Attributes:
        channels: C of x [N, C, H, W], conditioning channels included; None: those that it denoises.
        context_width: D of the context [N, L, D] that it attends to; None for no context.
        context_tokens: L, for a network that takes contexts of one length only.
        vector_width: width of the vector that it takes as ``y`` in place of a label; None for most.
    """

    channels: int | None = None
    context_width: int | None = None
    context_tokens: int | None = None
    vector_width: int | None = None


class DenoisingNetwork(nn.Module):
    """Base of all denoising networks: ``forward(x, t, context=None, y=None)``.

    x is [N, C, H, W], t [N] (already in the unit the network was trained with), context [N, L, D] for
    cross-attention, y [N] class labels; the result is [N, C', H, W]. A subclass sets ``inputs`` in its
    constructor.
    """

    inputs = NetworkInputs()

    def blocks(self) -> list[Block]:
        """Feature points in the order of execution."""
        raise NotImplementedError

    def members(self, name: str) -> list[str]:
        """Names of the modules in the list ``name``."""
        return [f"{name}.{i}" for i in range(len(getattr(self, name)))]


def conv3x3(channels: int, out_channels: int, role: str) -> nn.Conv2d:
    """3x3 convolution that keeps H and W."""
    return with_role(nn.Conv2d(channels, out_channels, 3, padding=1), role)


def embedding_layers(
    channels: int,
    hidden: int,
    out: int | None = None,
    role: str = "time_embedding",
    activation: nn.Module | None = None,
) -> list[nn.Module]:
    """Linear, SiLU (or ``activation``), Linear: [N, channels] -> [N, out], ``hidden`` wide by default."""
    layers = (nn.Linear(channels, hidden), nn.Linear(hidden, out or hidden))
    return [with_role(layers[0], role), activation or nn.SiLU(), with_role(layers[1], role)]


class AsymmetricConv2d(nn.Conv2d):
    """Conv2d whose zero padding differs by side, kept inside the layer.

    The DDPM family pads right and bottom only. Padding outside the layer would turn into +1 once the input
    is binarized; inside, taps outside the image count nothing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        sides: tuple[int, int, int, int],
    ) -> None:
        """``sides``: zeros added at the (left, right, top, bottom), as in ``F.pad``."""
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=0)
        self.sides = sides

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.sides))


class AttentionProduct(nn.Module):
    """softmax(q k^T scale) v as a module without parameters, so that its operations can be counted.

    q [N, heads, L, d], k [N, heads, M, d], v [N, heads, M, e] -> [N, heads, L, e]; scale defaults to
    d^-1/2. Runs torch's fused attention.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attend_heads(product: Callable[..., Tensor], heads: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention by ``product``: q [N, L, D], k and v [N, M, D] -> [N, L, D]."""
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return product(*split).transpose(1, 2).flatten(2)


class SkipJoin(nn.Module):
    """Concatenation of a decoder's features and the encoder's, for a residual block to read.

    [N, C, H, W] and [N, D, H, W] -> [N, C + D, H, W].
    """

    def forward(self, h: Tensor, skip: Tensor) -> Features:
        return torch.cat([h, skip], dim=1)


class LinearAttentionProduct(nn.Module):
    """v (k^T q): attention whose softmaxes were taken before (arXiv 1812.01243), as a module to be counted.

    q [N, heads, d, L], k [N, heads, d, M], v [N, heads, e, M] -> [N, heads, e, L].
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (v @ k.transpose(2, 3)) @ q


def sinusoidal_embedding(
    t: Tensor, dim: int, *, order: str, divisor_offset: int, ratio_first: bool = False
) -> Tensor:
    """Sinusoidal timestep embedding (Vaswani et al. 2017, arXiv 1706.03762), [N] -> [N, dim] in float32.

    Families differ in two details: ``order`` "sin_cos" or "cos_sin", and the frequencies
    exp(-ln(10000) i / (dim//2 - divisor_offset)). ``ratio_first`` (the DDPM family): the exponent is rounded
    as i times a ratio instead of a product divided.
    """
    half, log_period = dim // 2, -9.210340371976184
    places = torch.arange(half, dtype=torch.float32, device=t.device)
    divisor = half - divisor_offset
    exponent = places * (log_period / divisor) if ratio_first else places * log_period / divisor
    frequencies = torch.exp(exponent)
    angles = t.float()[:, None] * frequencies[None]
    parts = [angles.sin(), angles.cos()] if order == "sin_cos" else [angles.cos(), angles.sin()]
    embedding = torch.cat(parts, dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding
