"""Notes on the inputs of a network's modules during one run, by forward pre-hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def note_inputs(
    modules: Mapping[str, nn.Module],
    run: Callable[[], Tensor],
    note: Callable[[Any, tuple[Any, ...]], Any],
) -> tuple[dict[str, Any], Tensor]:
    """Call ``run`` and return ``note(module, inputs)`` of each called module's last call, by name in order
    of execution, and the output. The hooks are removed again.
    """
    seen: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen.__setitem__(name, note(module, inputs))

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        return seen, run()
