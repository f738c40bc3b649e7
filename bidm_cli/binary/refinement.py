"""Refinement net: a few float 3x3 convolutions behind a binary network's head, which see its input, too.

    Refinement.for_network(unet, Refine(channels=2, width=4)).attach(unet)

At low noise a network must tell x from x0 to a fraction of the noise's size, and that amplitude does not
survive signs. The head h gets ``channels`` more outputs, o = h(features), and with the time embedding e

    u = silu(first([x, o]) (1 + m) + c),   (m, c) = film(silu(e)),   output = o[:C] + last(silu(second(u)))

``film`` and ``last`` start at zero: at first the output is the head's. It helps pixel models; on latents it
was seen to do nothing (docs/method.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import conv3x3, role_of, with_role
from bidm_cli.recipe.spec import Refine


class Refinement(nn.Module):
    """See the module. Attached, it is ``network.refinement``.

    Args:
        head: name of the network's last convolution. time: name of the layer that gives e [N, E].
        inputs: channels of x. outputs: C. channels, width: as in the recipe. embedding: E.
    """

    def __init__(
        self, head: str, time: str, inputs: int, outputs: int, channels: int, width: int, embedding: int
    ) -> None:
        super().__init__()
        self.head, self.time, self.outputs, self.channels = head, time, outputs, channels
        self.arguments = {
            "head": head, "time": time, "inputs": inputs, "outputs": outputs,
            "channels": channels, "width": width, "embedding": embedding,
        }  # fmt: skip
        self.first = conv3x3(inputs + outputs + channels, width, "head")
        self.second = conv3x3(width, width, "head")
        self.last = conv3x3(width, outputs, "head")
        self.film = with_role(nn.Linear(embedding, 2 * width), "head")
        for parameter in (*self.last.parameters(), *self.film.parameters()):
            nn.init.zeros_(parameter)
        self._seen: dict[str, Tensor] = {}

    @classmethod
    def for_network(cls, network: nn.Module, refine: Refine, where: str = "refine") -> Refinement:
        """The net that fits a float network, on its device.

        Raises:
            BidmError: the network's head is no convolution, or it has no time embedding.
        """
        layers = [(name, layer) for name, layer in network.named_modules() if not list(layer.children())]
        heads = [(name, layer) for name, layer in layers if role_of(layer) == "head"]
        times = [(name, layer) for name, layer in layers if role_of(layer) == "time_embedding"]
        if not heads or not isinstance(heads[-1][1], nn.Conv2d) or not times:
            raise BidmError(
                f"{where}: this network has no convolutional head or no time embedding, so it cannot have a "
                "refinement net; leave out 'refine'"
            )
        # Two layers make the embedding of the timestep; further ones are those of labels.
        (head, last), (time, embedding) = heads[-1], times[:2][-1]
        stem = next(layer for _, layer in layers if isinstance(layer, nn.Conv2d))
        # A self-conditioned network puts another image beside its input by itself.
        inputs = stem.in_channels // (2 if getattr(network, "self_condition", False) is True else 1)
        sizes = (inputs, last.out_channels, refine.channels, refine.width, embedding.out_features)
        made = cls(head, time, *sizes)  # type: ignore[arg-type]
        return made.to(last.weight.device)  # type: ignore[arg-type]

    def attach(self, network: nn.Module) -> None:
        """Widen the head by ``channels`` filters that start at zero, and hook the network.

        Raises:
            BidmError: the network has no such layers.
        """
        modules = dict(network.named_modules())
        head = modules.get(self.head)
        if self.time not in modules or not isinstance(head, nn.Conv2d):
            raise BidmError(f"the network has no layers {self.head!r} and {self.time!r} for its refinement")
        network.set_submodule(self.head, _widened(head, self.channels))
        # Bound methods, unlike closures, let a deep copy of the network refer to its own copy of this module.
        network.register_forward_pre_hook(self._note_input)
        modules[self.time].register_forward_hook(self._note_embedding)
        network.get_submodule(self.head).register_forward_hook(self._refine)
        network.refinement = self

    def forward(self, x: Tensor, o: Tensor, embedding: Tensor) -> Tensor:
        """Refined output [N, C, H, W] of x [N, inputs, H, W], o [N, C + channels, H, W], e [N, E]."""
        scale, shift = self.film(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        u = F.silu(self.first(torch.cat([x, o], dim=1)) * (1 + scale) + shift)
        return o[:, : self.outputs] + self.last(F.silu(self.second(u)))

    def _note_input(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen["x"] = inputs[0]

    def _note_embedding(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen["embedding"] = output

    def _refine(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen, self._seen = self._seen, {}
        return self(seen["x"].to(output.dtype), output, seen["embedding"].to(output.dtype))

    def to_json(self) -> dict[str, Any]:
        """Arguments that rebuild the module."""
        return dict(self.arguments)


def _widened(head: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A copy of a convolution with more filters, which are zero."""
    same = {name: getattr(head, name) for name in ("kernel_size", "stride", "padding")}
    like: Any = {"device": head.weight.device, "dtype": head.weight.dtype, "bias": head.bias is not None}
    wide = nn.Conv2d(head.in_channels, head.out_channels + channels, **same, **like)
    with torch.no_grad():
        for new, old in ((wide.weight, head.weight), (wide.bias, head.bias)):
            if new is not None and old is not None and not new.is_meta:
                new.zero_()
                new[: head.out_channels] = old
    return with_role(wide, role_of(head))
