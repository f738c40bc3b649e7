"""Features of a network's blocks, captured while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class FeatureTap:
    """Keeps the outputs of named submodules of the latest forward pass.

    Hooks run in the order they were registered: a tap set after connections were attached sees blended
    features.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._modules = [network.get_submodule(name) for name in names]
        self._kept: dict[nn.Module, Tensor] = {}
        for module in self._modules:
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._kept[module] = output

    def take(self) -> list[Tensor]:
        """Captured outputs in the order of the names; forgets them, so that no graph outlives its step."""
        kept, self._kept = self._kept, {}
        return [kept[module] for module in self._modules]
