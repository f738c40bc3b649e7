"""Features of a network's blocks, captured while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class FeatureTap:
    """Keeps the outputs of named submodules of the latest forward pass.

        tap = FeatureTap(unet, ["middle_block"])
        unet(x, t)
        features = tap.take()               # one tensor per name, in the order of the names

    Hooks run in the order they were registered: a tap set after connections were attached sees blended
    features.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self._kept: dict[str, Tensor] = {}
        self._handles = [
            network.get_submodule(name).register_forward_hook(self._keeper(name)) for name in self.names
        ]

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._kept[name] = output

        return keep

    def take(self) -> list[Tensor]:
        """The captured outputs; forgets them, so that no graph outlives its step."""
        kept, self._kept = self._kept, {}
        return [kept[name] for name in self.names]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
