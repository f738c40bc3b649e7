"""State dicts inside a checkpoint file's contents, and putting them into a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.networks.stored_precision import keep_until_used

_WRAPPERS = ("module.", "_orig_mod.")
_EMA = re.compile(r"(?<![a-z])(ema|averaged?|shadow)(?![a-z])")
_EMA_FILE = re.compile(r"(?<![a-z])ema(?![a-z])")


@dataclass(frozen=True)
class Weights:
    """One state dict of a file.

    Attributes:
        where: its place in the file, such as "state_dict" or "[4]"; "" for the whole file.
        tensors: by name, without the prefixes that DataParallel and torch.compile add.
    """

    where: str
    tensors: dict[str, Tensor]

    @property
    def is_average(self) -> bool:
        """True if its place in the file says that these are averaged (EMA) weights."""
        return _EMA.search(self.where.lower()) is not None


def is_ema_name(name: str) -> bool:
    """True if a file's name says that its weights are averaged (EMA)."""
    return _EMA_FILE.search(name.lower()) is not None


def state_dicts(contents: Any, depth: int = 2, where: str = "") -> list[Weights]:
    """Every mapping of names to tensors in ``contents``, at most ``depth`` levels down, in file order."""
    found: list[Weights] = []
    if isinstance(contents, Mapping):
        tensors = {k: v for k, v in contents.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if tensors:
            found.append(Weights(where, _unwrapped(tensors)))
    if depth:
        for name, value in _children(contents):
            found += state_dicts(value, depth - 1, f"{where}.{name}".lstrip("."))
    return found


def _children(contents: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(contents, Mapping):
        yield from ((k, v) for k, v in contents.items() if isinstance(k, str))
    elif isinstance(contents, (list, tuple)):
        yield from ((f"[{i}]", value) for i, value in enumerate(contents[:16]))


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(4):
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def on_meta(architecture: dict[str, Any]) -> nn.Module:
    """The network of an architecture without memory for its weights."""
    with torch.device("meta"):
        return build(architecture)


def load_strictly(
    architecture: dict[str, Any],
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    origin: str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> nn.Module:
    """The network of ``architecture`` with exactly these weights, in eval mode.

    Weights are taken over without a copy; those that are not float32 become so when the network is first used
    (:mod:`bidm_cli.networks.stored_precision`).

    Args:
        what: "U-Net", "first stage", ...; for messages.
        origin: where the architecture comes from; for messages.
        ignored: names in ``tensors`` that may be left over.

    Raises:
        BidmError: keys are missing, left over or of another shape (the first few are listed), or values
            are not plain numbers.
    """
    network = on_meta(architecture)
    wanted = network.state_dict()
    surplus = [name for name in tensors if name not in wanted and not ignored(name)]
    missing = [name for name in wanted if name not in tensors]
    misshapen = [
        f"{name} (file {list(tensors[name].shape)}, network {list(value.shape)})"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {kind}: {_few(names)}"
        for kind, names in (("missing", missing), ("unexpected", surplus), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise BidmError(f"the {what}'s weights do not fit its architecture ({origin}): {'; '.join(problems)}")
    seen: set[int] = set()
    values = {name: _owned(name, tensors[name], seen) for name in wanted}
    network.load_state_dict(values, strict=True, assign=True)
    return keep_until_used(network.eval())


def _few(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _owned(name: str, tensor: Tensor, seen: set[int]) -> Tensor:
    """``tensor``, sharing its memory with no other weight.

    Views into larger storages and tied weights become copies of their own; hostile files describe huge
    tensors as views of one number, which is refused.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_floating_point():
        raise BidmError(
            f"the weight {name} is not a plain tensor of floats ({tensor.dtype}, {tensor.device})"
        )
    size = tensor.numel() * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if size > held:
        raise BidmError(f"the weight {name} claims {size} bytes and has {held}; the file is damaged")
    address = tensor.untyped_storage().data_ptr()
    if size != held or address in seen or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    seen.add(address)
    return tensor.detach()
