"""Segments that trainers put into the names of weights, removed: torch.compile, FSDP, DDP, running averages.

Names with an underscore in front are the wrappers' own, wherever they stand. ``module`` may be a network's
own child, so it goes only where all names beside it go through it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor

WRAPPERS = frozenset({
    "_orig_mod", "_forward_module", "_original_module", "_fsdp_wrapped_module", "_fpw_module",
    "_checkpoint_wrapped_module", "_dp_wrapped_module", "_ddp_module", "_module",
})  # fmt: skip
"""torch.compile, Lightning and its Fabric, FSDP (torch's, fairscale's), activation checkpointing, Opacus."""
COUNTERS = frozenset({"n_averaged", "num_updates", "decay", "initted", "step"})
"""Numbers that classes of running averages keep beside the weights."""
_MOST_LAYERS = 4
_DEEPEST = 32
_MOST_PREFIXES = 512


@dataclass(frozen=True)
class Unwrapped:
    """Tensors by name without wrappers; ``averages``: prefixes below which torch's AveragedModel has them."""

    tensors: dict[str, Tensor]
    averages: frozenset[str] = frozenset()


def unwrap(tensors: dict[str, Tensor]) -> Unwrapped:
    """``tensors`` by the names that they have without wrappers; as they are where two would become one."""
    plain = {name: _without_wrappers(name) for name in tensors}
    averages: set[str] = set()
    for _ in range(_MOST_LAYERS):
        wrapping = _prefixes_of_modules(plain.values())
        if not wrapping:
            break
        names = set(plain.values())
        averages |= {prefix for prefix in wrapping if f"{prefix}n_averaged" in names}
        averages = {_without_module(prefix, wrapping) for prefix in averages}
        plain = {name: _without_module(short, wrapping) for name, short in plain.items()}
    counts = {f"{prefix}n_averaged" for prefix in averages}
    plain = {name: short for name, short in plain.items() if short not in counts}
    if len(set(plain.values())) != len(plain):
        return Unwrapped(tensors)
    return Unwrapped({short: tensors[name] for name, short in plain.items()}, frozenset(averages))


def _without_wrappers(name: str) -> str:
    segments = name.split(".")
    return ".".join(part for part in segments if part not in WRAPPERS) if len(segments) > 1 else name


def _prefixes_of_modules(names: Iterable[str]) -> set[str]:
    """Prefixes below which all names begin with ``module.``, but for a running average's counters."""
    names = list(names)
    wrapping = {
        "".join(f"{part}." for part in parts[:depth])
        for parts in (name.split(".", _DEEPEST) for name in names)
        for depth, part in enumerate(parts[:-1])
        if part == "module"
    }
    return {
        prefix
        for prefix in sorted(wrapping)[:_MOST_PREFIXES]
        if all(
            name.startswith("module.", len(prefix)) or name[len(prefix) :] in COUNTERS
            for name in names
            if name.startswith(prefix)
        )
    }


def _without_module(name: str, wrapping: Collection[str]) -> str:
    """``name`` without the ``module.`` after the first of the prefixes ``wrapping`` that it goes through."""
    fitting = [prefix for prefix in wrapping if name.startswith(f"{prefix}module.")]
    if not fitting:
        return name
    prefix = min(fitting, key=len)
    return prefix + name[len(prefix) + len("module.") :]
