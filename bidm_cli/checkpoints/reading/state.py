"""State dicts inside a checkpoint file's contents, and putting them into a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.checkpoints.reading.wrappers import unwrap
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.networks.stored_precision import keep_until_used

_AVERAGE = "(?:model|net|unet)?ema(?:s|model|net|unet)?|averag(?:es?|ed|ing)|avg|swa|shadow|polyak"
_TRAINED = "non_?ema|no_?ema|online|raw|collected|current"
_WORD = re.compile(rf"(?<![a-z])(?:(?P<trained>{_TRAINED})|(?P<average>{_AVERAGE}))(?![a-z])")
_EMA_FILE = re.compile(r"(?<![a-z])(?<!non.)(?<!no.)(?:ema|swa)(?:only)?(?![a-z])")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_HOLDERS = ("callbacks", "optimizer_states")
_DEEPER = 2
_MOST_ITEMS = 16


@dataclass(frozen=True)
class Weights:
    """One state dict of a file.

    Attributes:
        where: its place in the file, such as "state_dict" or "[4]"; "" for the whole file.
        tensors: by name, without what trainers put into names (:mod:`.wrappers`).
        averaged: whether these are averaged (EMA) weights, where more than the place says so.
        averages: prefixes of names below which torch's AveragedModel keeps its weights.
        orphans: names of averages that belong to no trained weight.
    """

    where: str
    tensors: dict[str, Tensor]
    averaged: bool | None = None
    averages: frozenset[str] = frozenset()
    orphans: tuple[str, ...] = ()

    @property
    def is_average(self) -> bool:
        """True if these are averaged (EMA) weights, as far as the file says."""
        return is_average_place(self.where) if self.averaged is None else self.averaged

    def below(self, prefix: str, others: Collection[str] = ()) -> Weights:
        """The state dict below ``prefix``, without what is below longer ones among ``others``."""
        inner = tuple(other for other in others if other != prefix and other.startswith(prefix))
        kept = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(inner)}
        averaged = True if prefix in self.averages else None if prefix else self.averaged
        return Weights(f"{self.where}.{prefix}".strip("."), with_prefix(kept, prefix), averaged)


def is_average_place(where: str) -> bool:
    """True if a place in a file says that averaged (EMA) weights are there; its last word on it counts."""
    words = [match.lastgroup for match in _WORD.finditer(_CAMEL.sub("_", where).lower())]
    return bool(words) and words[-1] == "average"


def is_ema_name(name: str) -> bool:
    """True if a file's or folder's name says that its weights are averaged (EMA)."""
    return _EMA_FILE.search(_CAMEL.sub("_", name).lower()) is not None


def state_dicts(contents: Any, depth: int = 2, where: str = "") -> list[Weights]:
    """Every mapping of names to tensors in ``contents``, in file order.

    They are looked for ``depth`` levels down, and two more in a trainer's callbacks and optimizers and where
    a place says that averages are there.
    """
    found: list[Weights] = []
    for place, value in _walk(contents, depth, _DEEPER, where):
        if isinstance(value, Mapping):
            tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
            if tensors:
                plain = unwrap(tensors)
                averaged = True if "" in plain.averages else None
                found.append(Weights(place, plain.tensors, averaged, plain.averages))
    return _without_lightnings_swap(contents, found)


def averages_without_names(contents: Any) -> dict[str, list[Any]]:
    """Lists of averaged weights by their place: ``shadow_params`` and the like, without names."""
    return {
        place: list(value)
        for place, value in _walk(contents, 2, _DEEPER, "")
        if isinstance(value, (list, tuple))
        and len(value) > 1
        and sum(isinstance(item, Tensor) for item in value) > len(value) // 2
        and is_average_place(place)
    }


def _walk(contents: Any, depth: int, deeper: int, where: str) -> Iterator[tuple[str, Any]]:
    """Containers in ``contents`` with their places, outermost first."""
    yield where, contents
    for name, value in _children(contents, is_average_place(where)) if depth else ():
        place = f"{where}.{name}".lstrip(".")
        more = deeper if name in _HOLDERS or is_average_place(name) else 0
        yield from _walk(value, depth - 1 + more, deeper - more, place)


def _children(contents: Any, averages: bool) -> Iterator[tuple[str, Any]]:
    """Named containers in a mapping (by a number where ``averages`` go by their rate), or in a list."""
    if isinstance(contents, Mapping):
        for key, value in contents.items():
            if isinstance(value, (Mapping, list, tuple)) and isinstance(
                key, (str, float) if averages else str
            ):
                yield str(key), value
    elif isinstance(contents, (list, tuple)):
        for i, value in enumerate(contents[:_MOST_ITEMS]):
            if isinstance(value, (Mapping, list, tuple)):
                yield f"[{i}]", value


def _without_lightnings_swap(contents: Any, found: list[Weights]) -> list[Weights]:
    """Mark the average that Lightning's WeightAveraging saves as ``state_dict``; its ``current_model_state``
    has the weights as trained.
    """
    if not isinstance(contents, Mapping) or not {"averaging_state", "current_model_state"} <= contents.keys():
        return found
    return [replace(part, averaged=True) if part.where == "state_dict" else part for part in found]


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
