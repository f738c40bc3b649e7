"""The families' attention blocks on packed layers, with the residual sum in the last layer's epilogue.

Each class computes what its base class does, with the same layers under the same names; where one projection
gives queries, keys and values, the norm before it becomes its prologue, too. On the torch backend the same
operations run one by one in the original order.
"""

from __future__ import annotations

from torch import Tensor

from bidm_cli.networks import ddpm_unet, openai_blocks, w86_unet
from bidm_cli.networks.diffusers import blocks as diffusers_blocks
from bidm_cli.packed.backend import Prologue


class FusedAttentionBlock(openai_blocks.AttentionBlock):
    """That of the OpenAI and LDM networks."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        attended = self.attend(self.qkv(flat, Prologue(self.norm)))
        return self.proj_out(attended, None, None, flat).reshape(x.shape)


class FusedAttnBlock(ddpm_unet.AttnBlock):
    """The DDPM family's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.attend(self.norm(x)), None, None, x)


class FusedW86AttnBlock(w86_unet.AttnBlock):
    """w86763777's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.group_norm(x)), None, None, x)


class FusedAttention(diffusers_blocks.Attention):
    """diffusers'."""

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.group_norm is None else self.group_norm(x)
        attended = self.attend(h.flatten(2).transpose(1, 2))
        h = self.to_out[0](attended, None, None, x.flatten(2).transpose(1, 2))
        h = h.transpose(1, 2).reshape(x.shape)
        return h if self.scale == 1.0 else h / self.scale
