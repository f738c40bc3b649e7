"""Notes on the inputs of a network's modules during one run, by forward pre-hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def note_inputs(
    modules: Mapping[str, nn.Module],
    run: Callable[[], Tensor],
    note: Callable[[Any, tuple[Any, ...]], Any],
) -> tuple[dict[str, Any], Tensor]:
    """Call ``run``; return ``note(module, inputs)`` of each module's last call by name, and the output."""
    seen: dict[str, Any] = {}

    def hook(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[name] = note(module, inputs)

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(functools.partial(hook, name)).remove)
        return seen, run()
