"""Blocks of a packed network with what lies between the layers moved into them.

Each class computes what its base class does, with the same layers under the same names;
:func:`fuse_blocks` turns a network's modules into them in place. A norm and its SiLU become the next layer's
prologue, the time projection and the residual sum a layer's epilogue, so that activations are read and
written once. On the torch backend the same operations run one by one in the original order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.binary.connections import CrossTimestepConnections
from bidm_cli.networks.ddpm_unet import ResnetBlock
from bidm_cli.networks.openai_blocks import ResBlock
from bidm_cli.packed.modules import PackedLayer
from bidm_cli.packed.ops import Prologue
from bidm_cli.packed.select import backend_for, resolve


class PackedGroupNorm(nn.GroupNorm):
    """Group norm by the backend, where it does not become a layer's prologue.

    Attributes:
        backend: as in :class:`bidm_cli.packed.modules.PackedLayer`.
    """

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return backend_for(self.backend, input.device.type).normalize(input, Prologue(self))


class FusedResnetBlock(ResnetBlock):
    """The DDPM family's residual block."""

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        offset = None if embedding is None else self.temb_proj(F.silu(embedding))
        h = self.conv1(x, Prologue(self.norm1, silu=True), offset)
        skip = x if self.shortcut_name is None else getattr(self, self.shortcut_name)(x)
        return self.conv2(h, Prologue(self.norm2, silu=True), None, skip)


class FusedResBlock(ResBlock):
    """The residual block of the OpenAI and LDM networks."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        projected = self.emb_layers(embedding)
        offset = None if self.film else projected
        norm, _, conv = self.in_layers
        before = Prologue(norm, silu=True)  # type: ignore[arg-type]
        if self.resample is None:
            h = conv(x, before, offset)
        else:
            normed = backend_for(conv.backend, x.device.type).normalize(x, before)
            h, x = conv(self._resampled(normed), None, offset), self._resampled(x)
        scale, shift = projected.chunk(2, dim=1) if self.film else (None, None)
        between = Prologue(self.out_layers[0], True, scale, shift)  # type: ignore[arg-type]
        return self.out_layers[-1](h, between, None, self.skip_connection(x))


class PackedConnections(CrossTimestepConnections):
    """Cross-timestep connections that blend in one pass over the features, but on the torch backend.

    Attributes:
        backend: as in :class:`bidm_cli.packed.modules.PackedLayer`.
    """

    backend: str = "auto"

    def blend(self, index: int, feature: Tensor) -> Tensor:
        if self._active is None or resolve(self.backend, feature.device.type) == "torch":
            return super().blend(index, feature)
        betas, memory = self._active
        name = self.block_names[index]
        previous = memory.get(name)
        if previous is not None:
            beta = betas[:, index].to(feature.dtype).reshape(-1, *[1] * (feature.dim() - 1))
            feature = torch.lerp(feature, previous, beta)
        memory[name] = feature
        return feature


def fuse_blocks(network: nn.Module, backend: str = "auto") -> None:
    """Fuse the residual blocks whose convolutions are packed, and give group norms to the backend."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = PackedGroupNorm
            module.backend = backend  # type: ignore[assignment]
        elif type(module) is ResnetBlock:
            if _packed(module.conv1, module.conv2):
                module.__class__ = FusedResnetBlock
        elif type(module) is ResBlock and _packed(module.in_layers[-1], module.out_layers[-1]):
            module.__class__ = FusedResBlock


def _packed(*layers: nn.Module) -> bool:
    return all(isinstance(layer, PackedLayer) for layer in layers)
