"""The finder of a network's state dicts in a file, averaged (EMA) ones included, however they are kept.

Besides averages with the network's own names below some key or prefix, it finds those whose names

- have lost their dots (CompVis' LitEma: ``model_ema.diffusion_modelout2weight``),
- are the last parts of the trained weights' names (the average of a submodule),
- are gone (``shadow_params`` of torch_ema, diffusers' EMAModel and score_sde, NeMo's optimizer): lists in the
  order of the network's parameters, which is that of the trained weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from torch import Tensor

from bidm_cli.checkpoints.reading.state import Weights, averages_without_names, is_average_place
from bidm_cli.checkpoints.reading.wrappers import COUNTERS, WRAPPERS

Alternatives = tuple[tuple[str, ...], ...]
_MOST_PREFIXES = 8
_FEWEST = 4
_DOTLESS = re.compile(r"[^.]+(?:weight|bias)")
_NOT_TRAINED = re.compile(
    r"(?:^|\.)(?:running_mean|running_var|pos_embed|timembedding\.0\.weight|time_proj\.weight|W)$"
)
"""Tensors of a state dict that are no parameters, or frozen ones, which averages in a list leave out."""


@dataclass(frozen=True)
class Found:
    """A network's state dicts in a file.

    Attributes:
        named: those with the network's names, in file order. placed: those that got them from others.
        unplaced: places of averages that fit no weights, and why.
    """

    named: list[Weights]
    placed: list[Weights] = field(default_factory=list)
    unplaced: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> list[Weights]:
        """All of them."""
        return self.named + self.placed


@dataclass(frozen=True)
class _Inside:
    """A place inside trained weights: all of it below ``prefix``, where the network's names begin with
    ``network``, and ``mark`` is one of them.
    """

    trained: Weights
    prefix: str
    network: str
    mark: str

    def names(self, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
        """Names of floats below the prefix, in order."""
        return [
            name
            for name, tensor in self.trained.tensors.items()
            if name.startswith(self.prefix)
            and tensor.is_floating_point()
            and wanted(name[len(self.prefix) :])
        ]

    def is_most(self, count: int) -> bool:
        """True if ``count`` tensors are at least half of the network's."""
        return 2 * count >= sum(name.startswith(self.network) for name in self.trained.tensors)


def parts_of(alternatives: Alternatives, weights: Weights) -> list[Weights]:
    """The state dicts with all names of an alternative, at the top of ``weights`` or below prefixes.

    Trainers keep several networks, or one and its average, in one state dict (``net.``, ``net_ema.``).
    """
    for alternative in alternatives:
        mark = alternative[0]
        prefixes = _prefixes(weights, mark)
        complete = [p for p in prefixes if all(f"{p}{name}" in weights.tensors for name in alternative)]
        if complete:
            return [weights.below(prefix, complete) for prefix in complete]
    return []


def find(alternatives: Alternatives, found: list[Weights], contents: Any) -> Found:
    """All state dicts of the network with these names, as trained and averaged.

    Args:
        alternatives: complete sets of names, one of which a state dict of the network has.
        found: all state dicts of the file, as :func:`.state.state_dicts` gives them. contents: the file's.
    """
    parts = [part for weights in found for part in parts_of(alternatives, weights)]
    # ermongroup/ddim: [weights, optimizer, epoch, step, averages].
    parts = [replace(part, averaged=True) if part.where == "[4]" else part for part in parts]
    places = [place for part in parts if not part.is_average for place in _places_inside(alternatives, part)]
    if not places:
        lists = averages_without_names(contents)
        return Found(parts, [], dict.fromkeys(lists, "there are no weights as trained beside them"))
    placed: list[Weights] = []
    for weights in found:
        for prefix, inner in [*_dotless(weights, places), *_submodules(weights, places)]:
            if any(part.where == inner.where for part in parts + placed):
                continue
            placed.append(inner)
            parts = [_without(part, f"{weights.where}.{prefix}".lstrip(".")) for part in parts]
    unplaced: dict[str, str] = {}
    for where, values in averages_without_names(contents).items():
        named = _in_order(values, places)
        if isinstance(named, str):
            unplaced[where] = named
        else:
            placed.append(Weights(where, named, averaged=True))
    return Found(parts, placed, unplaced)


def dotted(names: Iterable[str]) -> dict[str, str]:
    """``names`` by what they are without their dots, as LitEma stores them; ambiguous ones are left out."""
    found: dict[str, str] = {}
    twice = set()
    for name in names:
        short = name.replace(".", "")
        twice |= {short} & found.keys()
        found[short] = name
    return {short: name for short, name in found.items() if short not in twice}


def _prefixes(weights: Weights, mark: str) -> list[str]:
    """Prefixes before ``mark`` in names, "" first."""
    found = [name[: -len(mark)] for name in weights.tensors if name == mark or name.endswith(f".{mark}")]
    return sorted(found[:_MOST_PREFIXES], key=lambda prefix: prefix != "")


def _places_inside(alternatives: Alternatives, trained: Weights) -> list[_Inside]:
    """The trained weights as a whole, and what is inside on the way to the network."""
    names = next((a for a in alternatives if all(name in trained.tensors for name in a)), None)
    if names is None:
        return []
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    segments = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    prefixes = ["".join(f"{part}." for part in segments[:i]) for i in range(len(segments) + 1)]
    return [_Inside(trained, prefix, prefixes[-1], names[0]) for prefix in prefixes]


def _dotless(weights: Weights, places: list[_Inside]) -> Iterator[tuple[str, Weights]]:
    """Averages whose names have lost their dots, by their prefix."""
    groups: dict[str, list[str]] = {}
    for name in weights.tensors:
        parent, dot, last = name.rpartition(".")
        groups.setdefault(parent + dot, []).append(last)
    for prefix, group in groups.items():
        where = f"{weights.where}.{prefix}".strip(".")
        short = [name for name in group if name not in COUNTERS]
        if sum(_DOTLESS.fullmatch(name) is not None for name in short) < _FEWEST or not is_average_place(
            where
        ):
            continue
        for place in places:
            full = dotted([name[len(place.prefix) :] for name in place.names()])
            known = {name: full.get(name) or full.get(_unwrapped(name)) for name in short}
            named = {place.prefix + to: weights.tensors[prefix + name] for name, to in known.items() if to}
            if 2 * len(named) >= len(short):
                orphans = tuple(name for name, to in known.items() if to is None)
                yield prefix, Weights(where, named, averaged=True, orphans=orphans)
                break


def _unwrapped(dotless: str) -> str:
    # Without dots, "_module" is also in the middle of words such as "all_modules".
    for wrapper in WRAPPERS - {"_module"}:
        dotless = dotless.replace(wrapper, "")
    return dotless


def _submodules(weights: Weights, places: list[_Inside]) -> Iterator[tuple[str, Weights]]:
    """Other weights of the network alone where the trained ones are those of something larger."""
    marks: set[str] = set()
    for place in places:
        if not place.prefix:
            continue
        short = place.mark[len(place.prefix) :]
        for prefix in _prefixes(weights, short):
            if f".{prefix}".endswith(f".{place.prefix}") or prefix + short in marks:
                continue
            inner = weights.below(prefix)
            named = {place.prefix + name: tensor for name, tensor in inner.tensors.items()}
            shared = named.keys() & place.trained.tensors.keys()
            if place.is_most(len(shared)):
                marks.add(prefix + short)
                yield prefix, Weights(inner.where, named, averaged=inner.is_average)


def _without(part: Weights, taken: str) -> Weights:
    """``part`` without the names below the place ``taken`` in the file."""
    start = f"{part.where}." if part.where else ""
    rest = taken[len(start) :]
    if not taken.startswith(start) or not rest:
        return part
    kept = {name: tensor for name, tensor in part.tensors.items() if not name.startswith(rest)}
    return replace(part, tensors=kept)


def _in_order(values: list[Any], places: list[_Inside]) -> dict[str, Tensor] | str:
    """Averages without names, by those of the weights in whose order they stand; or why they fit none."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != len(values):
        return "it holds something else than tensors"
    misfit = f"{len(tensors)} averaged (EMA) weights for {len(places[-1].names())} of the network"
    for place in places:
        for wanted in (_any, _is_trained, _is_below_the_top):
            names = place.names(wanted)
            if len(names) != len(tensors):
                continue
            named = dict(zip(names, tensors, strict=True))
            wrong = next((n for n in names if named[n].shape != place.trained.tensors[n].shape), None)
            if wrong is None:
                return named
            shapes = [list(found[wrong].shape) for found in (named, place.trained.tensors)]
            misfit = (
                f"the averaged (EMA) weight in the place of {wrong} is {shapes[0]}, the network's {shapes[1]}"
            )
    return misfit


def _any(name: str) -> bool:
    return True


def _is_trained(name: str) -> bool:
    return _NOT_TRAINED.search(name) is None


def _is_below_the_top(name: str) -> bool:
    """True for a parameter of a layer; the tensors at the top are mostly buffers (schedules, sigmas)."""
    return "." in name and _is_trained(name)
